"""Attention over llama.cpp's KV caches, as its x86 CPU kernels compute it; every rounding is straight-through.

float16        without flash attention: queries and probabilities are rounded too, sums are float32 (mul_mat).
float16_flash  llama.cpp's default settings. A call of fewer than 64 tokens (generation, short prompts) rounds queries
               and sums the values in float16, one key after the other; a longer one only keeps keys and values so.
int8           Q8_0 with flash attention: queries, keys and values in blocks of 32 along the head, sums in float32.
               Heads of a multiple of 64 are rotated by a Hadamard matrix first (llama.cpp since April 2026).
Source: ggml-cpu/ops.cpp, flash_attn_ext_f16_one_chunk and _tiled; llama-kv-cache.cpp, attn_rot_k and attn_rot_v.
"""

from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import TransformersKwargs

from qat.affine import choose_qparams
from qat.errors import UserError
from qat.fake_quantize import fake_quantize
from qat.scheme import KV_CACHES, QuantSpec

TILE = 64  # queries from which flash attention multiplies matrices (ggml_fa_tile_config)
Q8_0 = QuantSpec(qtype="int8", block=(1, 32), divide="reciprocal", scale="float16")
NEIGHBOURS = ("llama", "mistral")  # their heads are stored with the two halves interleaved: other blocks of 32
# keywords that models pass on: the mask has the window already, and masks, positions and caches are the caller's
WITHOUT_EFFECT = {*TransformersKwargs.__annotations__, "sliding_window", "use_cache", "cache_position"}
SCALED_QUERIES = ("gemma", "gemma2", "gemma3_text", "phi", "phi3")  # scaled before they are rounded


class _As(torch.autograd.Function):
    """The value of the second argument, the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _as(x: Tensor, value: Tensor) -> Tensor:
    return cast(Tensor, _As.apply(x, value))


def _half(x: Tensor) -> Tensor:
    return _as(x, x.detach().half().to(x.dtype))


def _q8_0(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return fake_quantize(rows, choose_qparams(rows.detach(), Q8_0), Q8_0).reshape(x.shape)


@cache
def hadamard(n: int) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix: float32 [n, n], n a power of two."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * (1.0 / torch.tensor(float(n)).sqrt().item())


def _rotate(x: Tensor, n: int) -> Tensor:
    return (x.unflatten(-1, (-1, n)) @ hadamard(n).to(x)).flatten(-2)


def _interleaved(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _float16_sums(scores: Tensor, value: Tensor) -> Tensor:
    """Softmax of scores (B, H, T, S) times value (B, H, S, D), summed key by key in float16 with a running maximum."""
    scores = scores.to(torch.promote_types(torch.float32, scores.dtype))
    largest = scores.cummax(-1).values
    before = nn.functional.pad(largest[..., :-1], (1, 0), value=-torch.inf)
    shrink, weight = (before - largest).exp().double(), (scores - largest).exp().double()
    total, out = torch.zeros_like(weight[..., :1]), weight.new_zeros(*scores.shape[:-1], value.shape[-1])
    for i in range(scores.shape[-1]):
        step = slice(i, i + 1)
        out = (out * shrink[..., step]).float().half().double()
        # a fused multiply-add in float32, then stored
        out = (out + weight[..., step] * value[..., step, :].double()).float().half().double()
        total = (total * shrink[..., step] + weight[..., step]).to(scores.dtype).double()
    return out.to(scores.dtype) * (1 / total).to(scores.dtype)


def attention(
    kind: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, H_kv, S, D) -> (B, T, H, D), weights.

    Raises UserError for a keyword that attention of this kind does not compute, such as the sinks `s_aux`.
    """
    if unknown := sorted(k for k, v in others.items() if v is not None and k not in WITHOUT_EFFECT):
        raise UserError(
            f"kv_cache={kind} does not compute attention with {unknown[0]}, which this model has; leave it out"
        )
    dim = query.shape[-1]
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    scale = dim**-0.5 if scaling is None else scaling
    if model_type in SCALED_QUERIES:
        query, scale = query * scale, 1.0
    int8, flash = kind == "int8", kind == "float16_flash"
    rotated = int8 and dim % 64 == 0
    if int8 and model_type in NEIGHBOURS:
        query, key = _interleaved(query), _interleaved(key)
    if rotated:
        widest = dim & -dim  # the largest power of two that divides
        query, key, value = _rotate(query, widest), _rotate(key, widest), _rotate(value, 64)
    one_by_one = flash and query.shape[2] < TILE
    kept = _q8_0 if int8 else _half
    key, value = kept(key), kept(value)
    if not flash or one_by_one:
        query = kept(query)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype)).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    out = (_half(dropped) if kind == "float16" else dropped) @ value
    if one_by_one and not (dropout and module.training):
        out = _as(out, _float16_sums(scores.detach(), value.detach()).to(out.dtype))
    if rotated:
        out = _rotate(out, 64)
    return out.transpose(1, 2).contiguous(), dropped


def refuse_kv_cache(model: nn.Module, kind: str) -> None:
    """Raises UserError for an unknown kind, one that does not fit the model's heads, and a model without transformers'
    attention interface."""
    if kind not in KV_CACHES:
        raise UserError(f"kv_cache={kind} is not possible; choose {', '.join(KV_CACHES)}, or leave it out for float32")
    if not hasattr(model, "set_attn_implementation"):
        raise UserError(f"kv_cache={kind} is for language models of transformers, not {type(model).__name__}")
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None)
    dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if kind == "int8" and dim % 32:
        raise UserError(
            f"kv_cache=int8 is kept in blocks of 32 along the head, and this model's heads have {dim} numbers; "
            "choose float16 or float16_flash"
        )


def use_kv_cache(model: nn.Module, kind: str) -> None:
    """Let every attention layer of a transformers model compute over a cache kept as `kind`, one of KV_CACHES.

    Raises UserError as `refuse_kv_cache` does.
    """
    refuse_kv_cache(model, kind)
    name = f"qat_kv_{KV_CACHES.index(kind)}"  # transformers takes a name with "flash" in it for a package to load
    AttentionInterface.register(name, partial(attention, kind))
    AttentionMaskInterface.register(name, eager_mask)
    cast(Any, model).set_attn_implementation(name)
