"""`import qat` lets transformers load its folders, exactly, for every architecture; it does not import it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_models import ALL, IDS, INT4, INT8, LINEAR, NEGATIVE, ZERO, logits, prepared, rule
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.quantizers import auto

from qat import hf_plugin
from qat.exporters import export, hf
from qat.packed.base import PackedLayer
from qat.packed.quantizer import QatConfig, QatQuantizer
from qat.scheme import QuantSpec

TOKEN = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
MODELS: dict[str, tuple[str, Any, list[Any], dict[str, Any]]] = {
    "gpt2": ("gpt2", AutoModelForCausalLM, ALL, {}),
    "gpt2 untied": ("gpt2", AutoModelForCausalLM, ALL, {"tie_word_embeddings": False}),
    "gpt2 linears alone": ("gpt2", AutoModelForCausalLM, [rule(None, "lm_head"), rule(INT4)], {}),
    "llama": ("llama", AutoModelForCausalLM, ALL, {}),
    "llama tied, asymmetric": ("llama", AutoModelForCausalLM, [rule(ZERO, ".*", ".*")], {"tie_word_embeddings": True}),
    "llama, int8 inputs": ("llama", AutoModelForCausalLM, [rule(None, "lm_head"), rule(NEGATIVE, input=TOKEN)], {}),
    "qwen2": ("qwen2", AutoModelForCausalLM, ALL, {"tie_word_embeddings": True}),
    "bert": ("bert", AutoModelForMaskedLM, ALL, {}),
    "bert classifier": (
        "bert classifier",
        AutoModelForSequenceClassification,
        [rule(INT8, ".*embeddings", "Embedding"), rule(INT4)],
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    kind, cls, rules, changes = MODELS[name]
    model, frozen = prepared(kind, rules, **changes)
    path = export(frozen, "hf", tmp_path / "out")
    loaded, info = cls.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert sum(isinstance(m, PackedLayer) and m.spec is not None for m in loaded.modules()) >= len(frozen.weights)
    loaded.save_pretrained(tmp_path / "again")
    again = hf.read(tmp_path / "again")
    assert again.digests() == frozen.digests()
    assert again.ties == frozen.ties


def test_bfloat16_keeps_the_stored_scales(tmp_path: Path) -> None:
    """float16 scales that bfloat16 cannot hold: the weight is still the float32 one, rounded once."""
    spec = QuantSpec(qtype="int4", block=(1, 32), scale="float16")
    _, frozen = prepared("gpt2", [rule(INT8, ".*wte", "Embedding"), rule(None, "lm_head"), rule(spec)])
    path = export(frozen, "hf", tmp_path / "out")
    name = "transformer.h.0.attn.c_attn"
    scale = frozen.weights[f"{name}.weight"].tensor.scale
    assert not torch.equal(scale.bfloat16().float(), scale.float())
    want = frozen.weights[f"{name}.weight"].dequantize().t().bfloat16()
    straight = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    assert straight.dtype == torch.bfloat16
    later = AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16)
    for model in (straight, later):
        layer = model.get_submodule(name)
        assert layer.weight_scale.dtype == torch.float16
        assert torch.equal(layer.dense(torch.bfloat16), want)
        assert model.transformer.wte(IDS).dtype == torch.bfloat16
    assert torch.equal(logits(straight), logits(later))


def test_a_base_model_and_another_head(tmp_path: Path) -> None:
    """AutoModel takes the body out of a file with a head; a classifier takes it and starts a head of its own."""
    model, frozen = prepared("bert", ALL)
    path = export(frozen, "hf", tmp_path / "out")
    with torch.no_grad():
        want = model.bert(IDS).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(path, add_pooling_layer=False)(IDS).last_hidden_state, want)
        assert torch.equal(AutoModelForSequenceClassification.from_pretrained(path).bert(IDS).last_hidden_state, want)


def test_generate(tmp_path: Path) -> None:
    model, frozen = prepared("gpt2", ALL)
    loaded = AutoModelForCausalLM.from_pretrained(export(frozen, "hf", tmp_path / "out"))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


def test_registered_once_and_also_after_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["qat"] is QatQuantizer
    hf_plugin.register(auto)
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "qat")
    hf_plugin.install()  # transformers' registry is imported already
    assert auto.AUTO_QUANTIZER_MAPPING["qat"] is QatQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qat"] is QatConfig


def test_before_transformers() -> None:
    """Importing qat imports neither torch nor transformers; when transformers comes, the method is registered."""
    code = """
import sys
import qat
heavy = [m for m in ("torch", "transformers", "pytorch_lightning") if m in sys.modules]
assert not heavy, heavy
from transformers.quantizers import auto
assert "qat" in auto.AUTO_QUANTIZER_MAPPING and "qat" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_linears_that_plain_transformers_can_read_need_no_plugin(tmp_path: Path) -> None:
    """And with qat imported the same folder still takes compressed-tensors' road."""
    model, frozen = prepared("llama", LINEAR)
    loaded = AutoModelForCausalLM.from_pretrained(export(frozen, "hf", tmp_path / "out"))
    assert not any(isinstance(m, PackedLayer) for m in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
