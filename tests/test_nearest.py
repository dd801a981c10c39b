"""The audit names the nearest grid that fits, and what it names passes the audit."""

import re
from typing import Any

import hydra
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from prepared_models import tiny
from tiny_text_models import tiny as tiny_text

from qat import recipes
from qat.auditing import audit
from qat.errors import UserError
from qat.exporters import target_module
from qat.exporters.gguf_blocks import SCHEMES, block_type
from qat.overrides import quote
from qat.promise import refuse_fallback


def composed(*overrides: str) -> Any:
    """The configuration of a run with these overrides."""
    with hydra.initialize_config_dir(str(recipes.CONFIGS), version_base="1.3"):
        return hydra.compose("train", [quote(o) for o in overrides])


def audited(model: Any, *overrides: str) -> str | None:
    """What the audit of a run with these overrides refuses; None if it passes."""
    made = composed(*overrides)
    rules = instantiate(made.scheme, _convert_="all")["rules"]
    exports: Any = [made.export] if isinstance(made.export, str) else list(made.export)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "name": "x"}
    try:
        rows = audit(model, rules, targets=exports, config=config)
        refuse_fallback(made.quant_method, rows, rules, config)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("target", "width", "named"),
    [
        ("gptq_int4", 64, "scheme.rules.1.scheme.weight.block=[1,32]"),  # 64 divides 64, but not the 96 of the MLP
        ("awq_int4", 96, "scheme.rules.1.scheme.weight.block=[1,32]"),
        ("mlx", 96, "scheme.rules.0.scheme.weight.block=[1,32] scheme.rules.1.scheme.weight.block=[1,32]"),
        ("llama_cpp_q4_k", 96, "target=null scheme=llama_q4_1 export=gguf"),
        ("llama_cpp_tq2_0", 96, "target=null scheme=llama_q4_0 export=gguf"),
        ("torchao_int4", 80, "scheme.rules.1.scheme.weight.block=[1,16]"),
    ],
)
def test_what_is_named_can_be_typed_and_passes(target: str, width: int, named: str) -> None:
    model = tiny_text("llama", hidden_size=width, head_dim=width // 4)
    said = audited(model, f"target={target}")
    assert said is not None
    typed = re.search(r"give (.*?), or leave", said)
    assert typed is not None, said
    assert typed[1] == named
    assert audited(model, *([] if "target=null" in named else [f"target={target}"]), *named.split()) is None


def test_weights_are_counted_and_not_scales() -> None:
    said = audited(tiny("llama"), "target=llama_cpp_q4_k")
    assert said is not None
    assert "rows of 64 weights, which blocks of (1, 256) do not divide" in said


def test_a_target_of_linear_layers_names_the_layer_that_is_none_and_targets_that_take_it() -> None:
    said = ""
    for target in ("torchao_int4", "vllm_w8a8", "executorch"):
        said = audited(tiny("gpt2"), f"target={target}") or ""
        assert re.search(r"transformer\.h\.0\.attn\.c_attn.* Conv1D.* give target=llama_cpp, target=mlx", said), said
    for target in re.findall(r"target=(\w+)", said):
        assert audited(tiny("gpt2"), f"target={target}") is None


@pytest.mark.parametrize(("target", "block"), [("gptq_int8", "-1"), ("awq_int4", "32")])
def test_gptq_and_awq_are_for_causal_language_models(target: str, block: str) -> None:
    said = audited(tiny("bert"), f"target={target}", f"scheme.rules.1.scheme.weight.block=[1,{block}]")
    assert said is not None
    assert "causal language models, not BertForMaskedLM" in said


def test_an_embedding_is_not_sent_from_one_format_to_another_that_refuses_it_too() -> None:
    for target in ("awq", "gptq", "executorch"):
        said = target_module(target).refuse("wte.weight", "Embedding", (512, 64), SCHEMES["llama_q8_0"], {})
        assert re.search("is for Linear layers.*, not Embedding; leave it out of the rules", said)
        assert "torchao" not in said


def test_the_schemes_that_gguf_names_have_its_grids() -> None:
    for name, spec in SCHEMES.items():
        rules = instantiate(OmegaConf.load(recipes.CONFIGS / "scheme" / f"{name}.yaml"), _convert_="all")["rules"]
        assert block_type(rules[-1].scheme.weight) == block_type(spec)


@pytest.mark.parametrize("target", ["transformers", "transformers_w8a16", "vllm_w4a8", "vllm_w8a8", "vllm_w8a8_static"])
def test_a_target_for_plain_loading_is_refused_where_it_would_need_import_qat(target: str) -> None:
    assert audited(tiny("llama"), f"target={target}") is None
    said = audited(tiny("gpt2"), f"target={target}")
    assert said is not None
    assert "Conv1D" in said
    if "import qat" in said:  # and not a scheme that has no Conv1D
        assert "c_attn.weight belongs to Conv1D, not to Linear; give quant_method=null" in said
        assert audited(tiny("gpt2"), f"target={target}", "quant_method=null") is None
    cached = tiny("llama")
    cached.config.kv_cache = "int8"
    assert "trained with kv_cache=int8" in (audited(cached, f"target={target}") or "")
    assert "quant_method=gptq is not possible" in (audited(cached, f"target={target}", "quant_method=gptq") or "")
