"""torch's int4 and int8 kernels: near the exact result, said so, and only where they fit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_models import ALL, CHANNEL, IDS, INT4, NEGATIVE, ZERO, logits, prepared, rule

import qat
from qat.exporters import export
from qat.packed import fast
from qat.packed.fast import FastLinear, Speedup
from qat.scheme import QuantSpec


def spec(**change: Any) -> QuantSpec:
    return QuantSpec(**{"qtype": "int4", "block": (1, 32), **change})


FITTING = {
    "int4 group": (INT4, "int4"),
    "int4 negative scales": (NEGATIVE, "int4"),
    "int4 group 16 times 2": (spec(block=(1, 64)), "int4"),
    "int4 channel": (spec(block=(1, -1)), "int4"),
    "int2": (spec(qtype="int2"), "int4"),
    "int8 channel": (CHANNEL, "int8"),
    "int6 channel": (spec(qtype="int6", block=(1, -1)), "int8"),
}
OTHERS = {
    "asymmetric": (ZERO, "asymmetric"),
    "int8 group": (spec(qtype="int8"), "one scale a row"),
    "int4 small group": (spec(block=(1, 16)), "groups by 32"),
    "several rows": (spec(block=(2, 32)), "several rows"),
    "float16 scales": (spec(scale="float16"), "bfloat16 cannot hold"),
}


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("vocab", [512, 509])
def test_near_the_exact_model(name: str, vocab: int, caplog: pytest.LogCaptureFixture) -> None:
    """509 outputs are padded to a multiple of the kernel's 16."""
    weight, kernel = FITTING[name]
    grid = weight if weight.block[1] != 64 else spec(block=(1, 32))  # 96 inputs of down_proj are no multiple of 64
    rules = [rule(grid, ".*down_proj"), rule(weight)]
    model, frozen = prepared("llama", rules, vocab_size=vocab, tie_word_embeddings=False)
    ids = IDS % vocab
    with caplog.at_level(logging.WARNING, logger="qat.packed.fast"):
        loaded = qat.load(frozen, kernel="fast")
    result: Speedup = loaded.qat_kernels
    assert set(result.fast.values()) == {kernel}
    assert len(result.fast) == 15
    assert not result.exact
    with torch.no_grad():
        got, want = loaded(ids).logits, model(ids).logits
    assert got.dtype == torch.float32
    error = (got - want).abs().max() / want.abs().max()
    assert 0 < error < 0.05
    assert 0 < result.max_difference < 0.05 * want.abs().max()
    assert f"{result.max_difference:.3g}" in caplog.text


@pytest.mark.parametrize("name", OTHERS)
def test_layers_without_a_kernel_stay_exact_and_say_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    weight, why = OTHERS[name]
    model, frozen = prepared("llama", [rule(None, "lm_head"), rule(weight)])
    with caplog.at_level(logging.WARNING, logger="qat.packed.fast"):
        loaded = qat.load(frozen, kernel="fast")
    assert not loaded.qat_kernels.fast
    assert loaded.qat_kernels.max_difference == 0
    assert all(why in reason for reason in loaded.qat_kernels.exact.values())
    assert why in caplog.text
    assert torch.equal(logits(loaded), logits(model))


def test_gpt2_mixes_both_and_generates(tmp_path: Path) -> None:
    """Conv1D on the int4 kernel; the tied table is shared with a lookup, so it stays."""
    _, frozen = prepared("gpt2", ALL)
    loaded = qat.load(export(frozen, "hf", tmp_path / "out"), kernel="fast", dtype=torch.bfloat16)
    assert len(loaded.qat_kernels.fast) == 8
    assert "shares its words" in loaded.qat_kernels.exact["lm_head"]
    assert isinstance(loaded.transformer.h[0].mlp.c_fc, FastLinear)
    assert loaded.generate(IDS, max_new_tokens=2, attention_mask=torch.ones_like(IDS)).shape == (2, 22)
    with pytest.raises(ValueError, match="not serializable"):
        loaded.save_pretrained(tmp_path / "again")


def test_a_kernel_that_is_wrong_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frozen = prepared("llama", [rule(None, "lm_head"), rule(INT4)])
    forward = FastLinear.forward
    monkeypatch.setattr(FastLinear, "forward", lambda self, x: forward(self, x) * 1.1)
    loaded = qat.load(frozen, kernel="fast")
    assert all("is off by" in why for why in loaded.qat_kernels.exact.values())

    def missing(self: FastLinear, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no such kernel\nbacktrace")

    monkeypatch.setattr(FastLinear, "forward", missing)
    loaded = qat.load(frozen, kernel="fast")
    assert set(loaded.qat_kernels.exact.values()) == {"the kernel fails here: no such kernel"}
    assert torch.equal(logits(loaded), logits(model))
    assert fast.TOLERANCE < 0.1
