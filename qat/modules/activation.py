"""SiLU and GELU as a runtime's x86 kernels compute them, to the last bit: ggml's and ONNX Runtime's.

Why it matters, and that training takes torch's own, is said in `qat.modules.norm`. Between two layers with rounded
inputs lies one of these: a last bit there flips codes of the second.

ggml         SiLU: x / (1 + exp(-x)), with an exp of its own (ggml_v_expf). Its GELU is a table,
             `qat.modules.gelu`.
onnxruntime  sigmoid and tanh as ratios of two polynomials (MLAS: logistic.cpp, tanh.cpp), SiLU as the product of x and
             sigmoid, as our graph has it. Of GELU the tanh form.
Compared on a processor with AVX2 and without AVX-512.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.modules.norm import fma

Function = Callable[[Tensor], Tensor]


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """By Horner's rule in fused multiply-adds, the highest power first."""
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = fma(x, y, torch.full_like(x, c))
    return y


_EXP = ("0x1.0e4020p-7", "0x1.573e2ep-5", "0x1.555e66p-3", "0x1.fffdb6p-2", "0x1.ffffecp-1")


def _ggml_exp(x: Tensor) -> Tensor:
    """ggml_v_expf: 2**n times a polynomial of what is left, |x| reduced by multiples of ln 2."""
    x = x.clamp(-120, 120)  # beyond float32's exponents: 0 and infinity
    a, b, c, d, e = (torch.full_like(x, float.fromhex(h)) for h in _EXP)
    shift = torch.full_like(x, float.fromhex("0x1.8p23"))  # adding it rounds to an integer
    n = fma(x, torch.full_like(x, float.fromhex("0x1.715476p+0")), shift) - shift
    rest = fma(-n, torch.full_like(x, float.fromhex("0x1.62e4p-1")), x)
    rest = fma(-n, torch.full_like(x, float.fromhex("0x1.7f7d1cp-20")), rest)
    square = rest * rest
    j = fma(fma(fma(a, rest, b), square, fma(c, rest, d)), square, e * rest)
    # 2**n as two factors, each of which is finite
    half = torch.ldexp(torch.ones_like(x), torch.div(n, 2, rounding_mode="floor"))
    other = torch.ldexp(torch.ones_like(x), n - torch.div(n, 2, rounding_mode="floor"))
    return fma(j, half, half) * other


def ggml_silu(x: Tensor) -> Tensor:
    """float32, elementwise."""
    return x / (1 + _ggml_exp(-x))


_SIGMOID = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
_SIGMOID_UNDER = (
    *(6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01),
    9.93151921023180e-01,
)
_TANH = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05),
    *(6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_UNDER = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def _ratio(x: Tensor, above: tuple[float, ...], under: tuple[float, ...]) -> Tensor:
    return x * _polynomial(x * x, above) / _polynomial(x * x, under)


def onnxruntime_silu(x: Tensor) -> Tensor:
    """float32, elementwise."""
    return x * (_ratio(x.clamp(-18, 18), _SIGMOID, _SIGMOID_UNDER) + 0.5).clamp(0, 1)


def onnxruntime_gelu_tanh(x: Tensor) -> Tensor:
    """float32, elementwise: 0.5 x (1 + tanh(x (0.0356774 x x + 0.7978846)))."""
    inner = x * (0.035677408136300125 * x * x + 0.7978845608028654)
    return 0.5 * x * (_ratio(inner.clamp(-9, 9), _TANH, _TANH_UNDER) + 1)


# transformers' modules by full name, what torch computes in training, and each runtime's
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_GELU_TANH = ("transformers.activations.NewGELUActivation", "transformers.activations.GELUTanh")
_TORCH: dict[str, Function] = {
    **dict.fromkeys(_SILU, F.silu),
    **dict.fromkeys(_GELU_TANH, partial(F.gelu, approximate="tanh")),
}
ACTIVATIONS: dict[str, dict[str, Function]] = {
    "ggml": dict.fromkeys(_SILU, ggml_silu),
    "onnxruntime": {**dict.fromkeys(_SILU, onnxruntime_silu), **dict.fromkeys(_GELU_TANH, onnxruntime_gelu_tanh)},
}


class KernelActivation(nn.Module):
    """In the place of an activation of transformers. name: that one's class, with its module."""

    def __init__(self, name: str, kernel: str) -> None:
        super().__init__()
        self.name, self.kernel = name, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; in evaluation computed in float32 whatever the dtype."""
        if self.training:
            return _TORCH[self.name](x)
        return ACTIVATIONS[self.kernel][self.name](x.float()).to(x.dtype)


def use_kernel_activations(model: nn.Module, kernel: str) -> int:
    """Replace, in place, every activation that a kernel of `ACTIVATIONS` computes; returns how many."""
    found = [
        (parent, key, name, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if (name := f"{type(child).__module__}.{type(child).__qualname__}") in ACTIVATIONS[kernel]
    ]
    for parent, key, name, child in found:
        new: Any = KernelActivation(name, kernel)
        setattr(parent, key, new.train(child.training))
    return len(found)
