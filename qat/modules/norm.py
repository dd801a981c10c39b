"""RMSNorm and LayerNorm as a runtime's x86 kernels compute them, to the last bit: ggml's and ONNX Runtime's.

The last bit matters where what follows is rounded to int8. Norm weights of few bits times the codes of an embedding put
many inputs of the first layers exactly on a rounding boundary, and there the last bit of one factor, the row's, decides
a hundred codes together. As with `QuantSpec.integer_dot` only evaluation pays for it: training takes torch's own norm.

ggml         x * rsqrt(mean + eps) * w; the squares are summed in float64. Its LayerNorm sums eight squares in float32,
             then those sums in float64.
onnxruntime  the same product, but squares are summed in float32, by fused multiply-adds into eight lanes. Its LayerNorm
             ends in one more: fma((x - mean) * rsqrt(variance + eps), w, b).
Sources: ggml-cpu/ops.cpp and vec.cpp (ggml_vec_cvar_f32); ONNX Runtime's was found by trying, on a processor with AVX2
and without AVX-512. Widths of whole eights are exact there; others differ in the last bit of a few rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 8
# transformers' modules by full name; Gemma's weights lie around 0
_AROUND_ONE = tuple(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}RMSNorm"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")
)
_AROUND_ZERO = tuple(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}RMSNorm"
    for name in ("Gemma", "Gemma2", "Gemma3")
)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once to float64 (the product is exact there) and then to float32."""
    return (a.double() * b.double() + c.double()).float()


def _folded(x: Tensor) -> Tensor:
    """Sums over the last dimension, a power of two, the upper half onto the lower: [..., n] -> [..., 1]."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x


def _lanes(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., C] -> [..., C / 8, 8] and what is left over."""
    whole = x.shape[-1] // LANES * LANES
    return x[..., :whole].unflatten(-1, (-1, LANES)), x[..., whole:]


def _squares_in_lanes(x: Tensor) -> Tensor:
    """Sum of squares by fused multiply-adds in eight lanes: float32 [..., C] -> [..., 1]."""
    eights, rest = _lanes(x)
    total = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], LANES)
    for part in eights.unbind(-2):
        total = fma(part, part, total)
    total = _folded(total)
    for part in rest.unbind(-1):
        total = fma(part[..., None], part[..., None], total)
    return total


def _squares_by_eights(x: Tensor) -> Tensor:
    """Sum of squares, eight in float32, then in float64: float32 [..., C] -> float64 [..., 1]."""
    eights, rest = _lanes(x * x)
    return _folded(eights).double().sum(-2) + rest.double().sum(-1, keepdim=True)


def ggml_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 [..., C], [C] -> [..., C]."""
    mean = ((x * x).double().sum(-1, keepdim=True) / x.shape[-1]).float()
    return x * torch.rsqrt(mean + eps) * weight


def ggml_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """float32 [..., C], [C], [C] -> [..., C]."""
    x = x - x.double().sum(-1, keepdim=True).float() / x.shape[-1]
    variance = (_squares_by_eights(x) / x.shape[-1]).float()
    return x * torch.rsqrt(variance + eps) * weight + bias


def onnxruntime_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float32 [..., C], [C] -> [..., C]."""
    return x * torch.rsqrt(_squares_in_lanes(x) / x.shape[-1] + eps) * weight


def onnxruntime_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """float32 [..., C], [C], [C] -> [..., C]."""
    x = x - (x.double().sum(-1, keepdim=True) / x.shape[-1]).float()
    return fma(x * torch.rsqrt(_squares_in_lanes(x) / x.shape[-1] + eps), weight, bias)


NORMS = {"ggml": (ggml_rms_norm, ggml_layer_norm), "onnxruntime": (onnxruntime_rms_norm, onnxruntime_layer_norm)}


class KernelRMSNorm(nn.Module):
    """In the place of a transformers RMSNorm, whose weight it keeps; around: what is added to that, 0 or Gemma's 1."""

    def __init__(self, like: Any, kernel: str, around: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = like.weight
        self.eps: float = like.eps if hasattr(like, "eps") else like.variance_epsilon
        self.kernel, self.around = kernel, around

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], computed in float32 whatever the dtype."""
        weight = self.weight.float() + self.around
        if self.training:
            return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return NORMS[self.kernel][0](x.float(), weight, self.eps).to(x.dtype)


class KernelLayerNorm(nn.Module):
    """In the place of a LayerNorm over the last dimension, whose weight and bias it keeps."""

    def __init__(self, like: nn.LayerNorm, kernel: str) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.kernel = like.weight, like.bias, like.eps, kernel

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], computed in float32 whatever the dtype."""
        weight, bias = self.weight.float(), self.bias.float()
        if self.training:
            return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)
        return NORMS[self.kernel][1](x.float(), weight, bias, self.eps).to(x.dtype)


def _instead(norm: nn.Module, kernel: str) -> nn.Module | None:
    name = f"{type(norm).__module__}.{type(norm).__qualname__}"
    if name in (*_AROUND_ONE, *_AROUND_ZERO):
        return KernelRMSNorm(norm, kernel, 0.0 if name in _AROUND_ONE else 1.0)
    if type(norm) is nn.LayerNorm and norm.bias is not None and norm.weight.ndim == 1:
        return KernelLayerNorm(norm, kernel)
    return None


def use_kernel_norms(model: nn.Module, kernel: str) -> int:
    """Replace, in place, every norm that a kernel of `NORMS` computes; returns how many. Parameters keep their names
    and their identity."""
    found = [
        (parent, name, new)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (new := _instead(child, kernel)) is not None
    ]
    for parent, name, new in found:
        setattr(parent, name, new.train(parent.training))
    return len(found)
