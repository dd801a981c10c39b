"""What a runtime computes otherwise than training did is said by every target that it is true of."""

from dataclasses import replace
from pathlib import Path

import pytest
from prepared_models import LINEAR, rule, tiny
from tiny_text_models import INT4, freeze
from tiny_text_models import tiny as tiny_text

from qat.conversion import convert, prepare
from qat.errors import UserError
from qat.exporters import caveats, export, gptq_layout, roundings
from qat.exporters.gguf_blocks import TYPES
from qat.frozen import Frozen, FrozenInput


@pytest.fixture(scope="module")
def gpt2() -> Frozen:
    model = prepare(tiny("gpt2"), [rule(INT4)], gelu="float16_table", kv_cache="float16")
    return convert(model, tokenizer={})


@pytest.mark.parametrize("target", ["onnx", "mlx", "torchao", "gptq", "awq", "executorch"])
def test_a_simulated_gelu_and_cache_are_not_dropped_in_silence(target: str, gpt2: Frozen) -> None:
    said = " ".join(caveats(gpt2, target))
    assert "gelu=float16_table" in said
    assert "kv_cache=float16" in said


def test_a_folder_for_plain_transformers_is_not_written_of_them() -> None:
    """A Llama that compressed-tensors holds goes to quant_method "qat", which computes its cache, and that is said."""
    frozen = convert(prepare(tiny("llama"), LINEAR, kv_cache="float16"), tokenizer={})
    (why,) = caveats(frozen, "hf")
    assert "trained with kv_cache=float16); `import qat` first" in why
    plain = replace(frozen, config={k: v for k, v in frozen.config.items() if k != "kv_cache"})
    assert not caveats(plain, "hf")


def test_who_cannot_load_a_folder_explains_no_figure(gpt2: Frozen) -> None:
    plain = replace(gpt2, config={k: v for k, v in gpt2.config.items() if k not in ("gelu", "kv_cache")})
    for target, said in (("gptq", gptq_layout.GPT2), ("hf", "plain transformers cannot read it")):
        assert roundings(plain, target) == []
        assert said in caveats(plain, target)[0]


@pytest.mark.parametrize("target", ["mlx", "gptq", "awq"])
def test_a_model_of_floats_alone_is_refused_where_the_format_is_of_quantized_ones(target: str, tmp_path: Path) -> None:
    floats = Frozen({}, dict(tiny("llama").named_parameters()), config=tiny("llama").config.to_dict())
    with pytest.raises(UserError, match="no weight is quantized"):
        export(floats, target, tmp_path / "out")


def test_llama_cpps_roundings_that_training_left_out_are_named(gpt2: Frozen) -> None:
    (inputs,) = caveats(gpt2, "gguf")
    assert "rounds the input of transformer.h.0.attn.c_attn.weight and 8 more to 8 bits" in inputs
    (spec,) = (t.inputs for t in TYPES if t.ggml.name == "Q4_0")
    modules = [n.removesuffix(".weight") for n in (*gpt2.weights, *gpt2.ties)]
    assert not caveats(replace(gpt2, inputs={m: FrozenInput(spec, False) for m in modules}), "gguf")
    untrained = replace(gpt2, config={**gpt2.config, "gelu": None})
    assert "llama.cpp reads GELU from a float16 table" in caveats(untrained, "gguf")[1]
    assert len(caveats(freeze(tiny_text("llama"), {}), "gguf")) == 1  # its activation is no GELU
