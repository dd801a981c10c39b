"""Attention over a float16 KV cache, as llama.cpp computes it on a CPU; the rounding is straight-through.

Keys and values are kept in float16, so queries and probabilities are rounded to float16 for the products, which are
summed in float32 (ggml-cpu.c, mul_mat's vec_dot_type). This is llama.cpp's default cache without flash attention, whose
float16 sums are not simulated, nor are quantized caches, which need it.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from qat.errors import UserError


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _half(x: Tensor) -> Tensor:
    return cast(Tensor, _Half.apply(x))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, H_kv, S, D) -> (B, T, H, D), weights."""
    query, key, value = _half(query), _half(key), _half(value)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (_half(weights) @ value).transpose(1, 2).contiguous(), weights


def use_kv_cache(model: nn.Module, kind: str) -> None:
    """Let every attention layer of a transformers model compute over a cache kept as `kind`, "float16".

    Raises UserError for another kind, and for a model without transformers' attention interface.
    """
    if kind != "float16":
        raise UserError(f"kv_cache={kind} is not possible; choose float16, or leave it out for float32")
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is None:
        raise UserError(f"kv_cache={kind} is for language models of transformers, not {type(model).__name__}")
    AttentionInterface.register("qat_kv_float16", attention)
    AttentionMaskInterface.register("qat_kv_float16", eager_mask)
    switch("qat_kv_float16")
