"""What llama.cpp rounds besides weights and inputs, `qat.load` computes too: bit for bit the trained model's logits."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from prepared_models import logits, tiny
from transformers import AutoModelForCausalLM

import qat
from qat.exporters import export
from qat.packed.load import pack
from qat.recipes import CONFIGS


@pytest.mark.parametrize(
    ("name", "kind", "kv_cache"),
    [
        ("q4_1", "llama", None),  # rounded block sums
        ("q4_k", "llama", "int8"),
        ("q4_0", "llama", "float16_flash"),
        ("q4_0", "gpt2", "float16"),  # the table's GELU as well
        ("q4_1", "gpt2", None),
        ("q4_0", "gemma2", None),
        ("tq2_0", "gpt_neox", None),  # GELU by erf, trained as the table's
    ],
)
def test_every_source_computes_what_was_trained(name: str, kind: str, kv_cache: str | None, tmp_path: Path) -> None:
    chosen = instantiate(OmegaConf.load(CONFIGS / "scheme" / f"llama_{name}.yaml"), _convert_="all")
    shape = {"n_embd": 256} if kind == "gpt2" else {"hidden_size": 256, "intermediate_size": 256}
    shape |= {"head_dim": 64} if kind in ("llama", "gemma2") else {}
    model = tiny(kind, **shape)
    float_logits = logits(model)
    model = qat.prepare(model, **{**chosen, "kv_cache": kv_cache}).eval()
    model.config.architectures = [type(model).__name__]  # pyright: ignore
    frozen = qat.convert(model, tokenizer={"tokenizer_config.json": b"{}"})
    want = logits(model)
    assert not torch.equal(want, float_logits)
    path = export(frozen, "hf", tmp_path / "hf")
    assert torch.equal(logits(qat.load(frozen)), want)
    assert torch.equal(logits(qat.load(path)), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), want)  # as anyone loads it after import qat
    assert torch.equal(logits(pack(tiny(kind, **shape), frozen)), want)
