"""The audit: every parameter accounted for, sizes that come true, and refusals that name the thing and the remedy."""

import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from test_conversion import GPT2_RULES, INT4, INT8, cnn, gpt2, llama
from tiny_models import tiny_gpt2
from torch import nn
from transformers import GPT2LMHeadModel

from qat.auditing import audit
from qat.conversion import convert, prepare
from qat.errors import UserError
from qat.exporters import export
from qat.scheme import QuantSpec, Rule, Scheme


def test_every_parameter_is_listed_once_with_a_reason() -> None:
    model = gpt2()
    rows = audit(model, GPT2_RULES).rows
    assert [r.name for r in rows] == [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert all(r.reason for r in rows)
    by = {r.name: r for r in rows}
    assert by["transformer.wte.weight"].spec == INT8.weight
    assert by["lm_head.weight"].tied == "transformer.wte.weight"
    assert by["lm_head.weight"].numel == 0
    assert by["transformer.wpe.weight"].reason == "no rule matches it"
    assert by["transformer.h.0.ln_1.weight"].reason == "LayerNorm is not a layer that can be quantized"
    assert by["transformer.h.0.mlp.c_fc.weight"].matrix == (256, 64)
    assert by["transformer.h.0.mlp.c_fc.bias"].spec is None
    coverage = audit(model, GPT2_RULES).coverage()
    assert {c["scheme"] for c in coverage} == {"float", INT4.weight.label(), INT8.weight.label()}


@pytest.mark.parametrize("factory", [gpt2, llama])
def test_the_expected_size_is_the_size(factory) -> None:
    rules = GPT2_RULES if factory is gpt2 else [Rule(path="lm_head"), Rule(type="Linear", scheme=INT4)]
    expected = audit(factory(), rules)
    frozen = convert(prepare(factory(), rules))
    parameters = dict(factory().named_parameters())
    floats = sum(t.numel() for n, t in frozen.floats.items() if n in parameters)
    packed = sum(
        w.tensor.codes.numel() * w.tensor.spec.type.bits // 8 + w.tensor.scale.nbytes for w in frozen.weights.values()
    )
    assert expected.nbytes == packed + floats * 4
    assert expected.float_nbytes == sum(p.nbytes for p in factory().parameters())


def test_first_match_wins_and_the_order_of_rules_matters() -> None:
    rules = [Rule(path=r"transformer\.h\.0\..*", type="Conv1D"), Rule(type="Conv1D", scheme=INT4)]
    by = {r.name: r for r in audit(gpt2(), rules).rows}
    assert by["transformer.h.0.mlp.c_fc.weight"].reason == "rule 1 leaves it"
    assert by["transformer.h.1.mlp.c_fc.weight"].spec == INT4.weight


def refused(model: nn.Module, rules: list[Rule], match: str, **kwargs) -> None:
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(UserError, match=match):
        audit(model, rules, **kwargs)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_refusals() -> None:
    refused(gpt2(), [Rule(type="Linear", path="transformer.*", scheme=INT4)], "rule 1 .* decides nothing .*Conv1D")
    refused(gpt2(), [*GPT2_RULES, Rule(type="Conv1D", scheme=INT8)], "rule 3 .* decides nothing")
    refused(gpt2(), [Rule(path="(", scheme=INT4)], r"rule 1: '\(' is not a regular expression")
    refused(gpt2(), [Rule(type="Conv1D")], "no parameter is quantized")
    two = [Rule(path=".*wte", scheme=INT8), Rule(path="lm_head", scheme=INT4)]
    refused(gpt2(), two, r"wte\.weight and lm_head\.weight are one tied tensor")


def test_a_block_that_does_not_fit_is_refused_with_what_can_be_typed() -> None:
    odd = Rule(type="Conv1D", scheme=Scheme(weight=QuantSpec(qtype="int4", block=(1, 48))))
    with pytest.raises(UserError, match=r"c_attn\.weight is 192 rows of 64 weights, which blocks of \(1, 48\)") as e:
        audit(gpt2(), [odd])
    path = re.search(r"path: '(.*)'\}", str(e.value))
    assert path is not None
    left = Rule(path=path[1])  # as the message says, first: the next layer's shape is named then
    with pytest.raises(UserError, match=r"attn\.c_proj\.weight"):
        audit(gpt2(), [left, odd])
    with pytest.raises(UserError, match=re.escape("give scheme.rules.0.scheme.weight.block=[1,32]")):
        audit(gpt2(), [odd], targets=["hf"], config=gpt2().config.to_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_the_size_of_each_export_comes_true(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2(tmp_path / "float"), dtype=dtype)
    config = {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    expected = audit(model, GPT2_RULES, targets=[target], config=config)
    assert expected.float_nbytes == sum(p.nbytes for p in model.parameters())
    tokenizer = {f.name: f.read_bytes() for f in (tmp_path / "float").glob("*token*")}
    frozen = convert(prepare(model, GPT2_RULES), config=config, tokenizer=tokenizer)
    folder = export(frozen, target, tmp_path / target)
    if target == "gguf":
        written = sum(int(t.n_bytes) for t in GGUFReader(folder / "model.gguf").tensors)
    else:
        written = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert expected.export_nbytes(target) == written


def test_input_blocks_are_checked_before_any_forward_pass() -> None:
    def scheme(*block: int) -> list[Rule]:
        return [Rule(scheme=Scheme(weight=INT8.weight, input=QuantSpec(qtype="int8", block=block)))]

    linear = nn.Sequential(nn.Linear(96, 8))
    refused(linear, scheme(1, 64), r"input block \(1, 64\) does not fit inputs of 96 features")
    refused(linear, scheme(4, 32), r"does not fit")
    for block in ((1, 32), (1, -1), (-1, -1)):
        model = prepare(nn.Sequential(nn.Linear(96, 8)), scheme(*block))
        assert model(torch.randn(2, 5, 96)).shape == (2, 5, 8)
    conv = Scheme(weight=QuantSpec(qtype="int8"), input=QuantSpec(qtype="int8", block=(1, -1)))
    refused(cnn(), [Rule(scheme=conv)], r"the input of a Conv2d takes block \(-1, -1\)")


def test_an_export_that_cannot_hold_the_grid_is_refused() -> None:
    three = Scheme(weight=QuantSpec(qtype="int3", block=(1, 32)))
    model, rules = gpt2(), [Rule(type="Conv1D", scheme=three)]
    refused(model, rules, r"export to gguf: .*\.weight .*shape", targets=["gguf"], config=model.config.to_dict())


def test_inputs_that_a_target_cannot_hold() -> None:
    inputs = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
    weight = QuantSpec(qtype="int8", block=(1, 32))
    scheme = Scheme(weight=weight, input=inputs, static=True)
    rules = [Rule(path="(?!.*lm_head).*", type="Conv1D", scheme=scheme)]
    config = gpt2().config.to_dict()
    refused(gpt2(), rules, "llama.cpp quantizes inputs of Q8_0 weights in its own way", targets=["gguf"], config=config)
    refused(gpt2(), rules, "export to onnx: transformer.h.0.attn.c_attn.weight", targets=["onnx"], config=config)
    assert audit(gpt2(), rules, targets=["hf"], config=config).rows
