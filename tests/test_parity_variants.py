"""The variants of the parity table: each composes, is another file than its target's, and is written or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import rows
from parity_subjects import EVEN, RANDOM
from parity_variants import VARIANTS, changed, exports, scheme_of
from prepared_models import tiny
from tiny_text_models import byte_level_tokenizer, tokenizer_files

import qat
from qat.conversion import calibrate
from qat.errors import UserError
from qat.exporters import export, target_module
from qat.exporters.reading import read
from qat.models.load import EMBEDDED
from qat.scheme import QuantSpec, Rule, Scheme

END = "<|endoftext|>"
REFUSED = {"gptq_int4_asymmetric@v1": "training may choose a zero point of 0"}


def made(target: str) -> tuple[Any, list[Rule]]:
    model = tiny("llama", **{k: v for k, v in EVEN.items() if k != "vocab_size"}, tie_word_embeddings=False)
    model.config.architectures = [type(model).__name__]
    return model, scheme_of(target)["rules"]


@pytest.mark.parametrize("target", [n for n, v in VARIANTS.items() if n not in REFUSED and v.exporter != "executorch"])
def test_every_variant_is_written_and_read_back(target: str, tmp_path: Path) -> None:
    exporter = VARIANTS[target].exporter
    model, rules = made(target)
    config = model.config.to_dict()
    qat.audit(model, rules, targets=[exporter], config=config)
    net = qat.prepare(model, rules, **{k: v for k, v in scheme_of(target).items() if k != "rules"}).eval()
    calibrate(net, [torch.arange(2, 34)[None]], lambda m, ids: m(ids))
    files = tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, pad_token=END)
    frozen = qat.convert(net, config=config, tokenizer=files)
    path = export(frozen, exporter, tmp_path / "out")
    assert read(target_module(exporter), path).digests() == frozen.digests()


def test_a_compiled_variant_passes_the_audit() -> None:
    """It is lowered in its own environment, and not read back."""
    model, rules = made("executorch@g64")
    assert qat.audit(model, rules, targets=["executorch"], config=model.config.to_dict()).rows


@pytest.mark.parametrize("target", REFUSED)
def test_what_cannot_be_held_is_refused_with_the_reason(target: str) -> None:
    model, rules = made(target)
    with pytest.raises(UserError, match=REFUSED[target]):
        qat.audit(model, rules, targets=[VARIANTS[target].exporter], config=model.config.to_dict())


@pytest.mark.parametrize("target", VARIANTS)
def test_a_variant_is_no_target_again(target: str) -> None:
    base = target.partition("@")[0]
    same = scheme_of(target) == scheme_of(base)
    assert not (same and (base, VARIANTS[target].exporter) in exports())


def test_the_grid_of_linears_changes_wherever_it_is_used() -> None:
    linear, other = QuantSpec(qtype="int4"), QuantSpec(qtype="int8")
    rules = [Rule(path="head"), Rule(path="a", scheme=Scheme(weight=other)), Rule(scheme=Scheme(weight=linear))]
    same = Rule(path="b", scheme=Scheme(weight=linear))
    found = changed([*rules[:2], same, rules[2]], lambda spec: QuantSpec(qtype="int2", block=spec.block))
    grids = [r.scheme and r.scheme.weight and r.scheme.weight.qtype for r in found]
    assert grids == [None, "int8", "int2", "int2"]
    assert [r.path for r in found] == ["head", "a", "b", ".*"]


def test_rows_are_in_the_tables_order_a_variant_after_its_target_on_two_models() -> None:
    names = [*EMBEDDED, *RANDOM]
    every = rows([target for target, _ in exports()], names)
    mlx = [key for key in every if key[0].startswith("mlx")]
    assert [key[2] for key in mlx[:5]] == names
    assert mlx[5:7] == [("mlx@2bit", "mlx", "gpt2_mini"), ("mlx@2bit", "mlx", "random Llama, float32")]
    assert rows(["mlx"], names) == mlx[:5]
    assert rows(["gptq_int4@v1"], ["gpt2_mini", "llama_mini"]) == [("gptq_int4@v1", "gptq_v1", "llama_mini")]


def test_every_variant_has_its_target() -> None:
    assert {target for target, _ in exports()} >= VARIANTS.keys()
