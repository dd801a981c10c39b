"""Attention over simulated KV caches: against a plain loop over keys, scipy's Hadamard matrix and torch's gradients."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import GGMLQuantizationType, dequantize, quantize
from scipy.linalg import hadamard as scipy_hadamard
from tiny_text_models import tiny
from torch import Tensor, nn

from qat.errors import UserError
from qat.modules import attention as module
from qat.modules.attention import attention, hadamard, use_kv_cache
from qat.scheme import KV_CACHES


def layer(model_type: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type), training=False)


def tensors(tokens: int = 12, dim: int = 64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, heads, tokens, dim, requires_grad=True) for heads in (4, 2, 2)]


def mask(tokens: int) -> Tensor:
    return torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(("kind", "far"), [("float16", 2e-3), ("float16_flash", 4e-3), ("int8", 4e-2)])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_it_is_attention_but_for_the_rounding(kind: str, far: float, dim: int) -> None:
    """Value close to, yet other than, torch's; gradients those of attention over the rounded tensors."""
    for tokens in (12, 64):
        q, k, v = tensors(tokens, dim)
        got, _ = attention(kind, layer("llama"), q, k, v, mask(tokens))
        want = exact(q, k, v)
        assert 0 < (got - want).abs().max() < far
        out = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad((y * out).sum(), (q, k, v)) for y in (got, want)), strict=True):
            assert ((a - b).norm() / b.norm()) < 4 * far


def test_float16_sums_are_those_of_a_plain_loop() -> None:
    """ggml's online softmax, one query and head at a time, in numpy."""
    q, k, v = (t.detach() for t in tensors(9, 32))
    got, _ = attention("float16_flash", layer("llama"), q, k, v, mask(9))
    q16, k16, v16 = (t.numpy().astype(np.float16).astype(np.float32) for t in (q, k, v))
    one = np.float32
    for b, h, t in np.ndindex(2, 4, 9):
        total, largest, sums = one(0), one(-np.inf), np.zeros(32, np.float16)
        for i in range(t + 1):
            s = one(np.dot(k16[b, h // 2, i], q16[b, h, t]) * one(32**-0.5))
            if s > largest:
                shrink, weight, largest = np.exp(largest - s), one(1), s
                sums = (sums.astype(one) * shrink).astype(np.float16)
            else:
                shrink, weight = one(1), np.exp(s - largest)
            fused = sums.astype(np.float64) + v16[b, h // 2, i].astype(np.float64) * np.float64(weight)
            sums = fused.astype(one).astype(np.float16)
            total = total * shrink + weight
        want = sums.astype(one) / total
        # a weight of another last bit may move a sum by one float16 step
        np.testing.assert_allclose(got[b, t, h].numpy(), want, rtol=2**-10, atol=2**-12)


def test_from_a_tile_of_queries_on_sums_are_float32() -> None:
    q, k, v = tensors(64)
    got, _ = attention("float16_flash", layer("llama"), q, k, v, mask(64))
    torch.testing.assert_close(got, exact(q, k.half().float(), v.half().float()))
    short, _ = attention("float16_flash", layer("llama"), q[:, :, :63], k[:, :, :63], v[:, :, :63], mask(63))
    assert not torch.allclose(short, got[:, :63], atol=1e-5)


def test_int8_blocks_are_ggmls() -> None:
    """gguf's Q8_0 differs in ties and reciprocals only: at most a step of one code, in few places."""
    x = torch.randn(64, 64)
    ours = module._q8_0(x)
    theirs = torch.from_numpy(dequantize(quantize(x.numpy(), GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0))
    assert (ours != theirs).float().mean() < 0.02
    assert (ours - theirs).abs().max() < x.abs().max() / 100


@pytest.mark.parametrize("n", [64, 128])
def test_the_rotation_is_scipys(n: int) -> None:
    torch.testing.assert_close(hadamard(n), torch.from_numpy(scipy_hadamard(n) / n**0.5).float())
    torch.testing.assert_close(hadamard(n) @ hadamard(n), torch.eye(n))


def test_blocks_follow_the_order_of_the_runtimes_heads() -> None:
    """A Llama's heads are interleaved in llama.cpp, a Qwen's are not: an outlier then shares its block with others."""
    q, k, v = (t.detach() for t in tensors(12, 32 * 3))  # 96: not rotated
    k[..., 0] = 50
    q[..., 0] = 0.1
    one, other = (attention("int8", layer(kind), q, k, v, mask(12))[0] for kind in ("llama", "qwen2"))
    assert not torch.equal(one, other)


def test_softcap_is_applied() -> None:
    q, k, v = tensors()
    capped, _ = attention("float16", layer("gemma2"), q * 9, k * 9, v, mask(12), softcap=2.0)
    scores = (q * 9) @ (k * 9).repeat_interleave(2, 1).transpose(2, 3) / 8
    want = (2 * torch.tanh(scores / 2) + mask(12)).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(capped, want.transpose(1, 2), rtol=0, atol=2e-2)
    uncapped, _ = attention("float16", layer("gemma2"), q * 9, k * 9, v, mask(12))
    assert (uncapped - capped).abs().max() > 1


@pytest.mark.parametrize("kind", KV_CACHES)
def test_every_kind_runs_in_a_model(kind: str) -> None:
    model = tiny("llama", head_dim=64)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        use_kv_cache(model, kind)
        after = model(ids).logits
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="kv_cache=int4 is not possible; choose float16, float16_flash, int8"):
        use_kv_cache(tiny("llama"), "int4")
    with pytest.raises(UserError, match="blocks of 32 along the head, and this model's heads have 16 numbers"):
        use_kv_cache(tiny("gpt2"), "int8")
    with pytest.raises(UserError, match="language models of transformers, not Linear"):
        use_kv_cache(nn.Linear(2, 2), "int8")
    q, k, v = tensors()
    with pytest.raises(UserError, match="kv_cache=float16 does not compute attention with s_aux"):
        attention("float16", layer("gpt_oss"), q, k, v, mask(12), s_aux=torch.zeros(4))
