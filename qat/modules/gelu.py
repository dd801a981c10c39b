"""llama.cpp's GELU on a CPU, a table from float16 to float16 of the tanh form (ggml vec.h); GELU's own gradient."""

import ctypes
import ctypes.util
import math
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

# whatever form a model asks for, llama.cpp computes this one
GELUS = (
    "transformers.activations.NewGELUActivation",
    "transformers.activations.GELUTanh",
    "transformers.activations.GELUActivation",
    "transformers.activations.FastGELUActivation",
)


@cache
def _table() -> Tensor:
    """float32 [65536]: the float16 result for every float16, by its bits. The C library's tanhf, as in ggml: close to
    -1 the last bit of tanh decides whether 1 + tanh is 0."""
    library = ctypes.util.find_library("m")
    tanhf = ctypes.CDLL(library).tanhf if library else math.tanh
    if library:
        tanhf.restype, tanhf.argtypes = ctypes.c_float, [ctypes.c_float]
    x = torch.arange(65536).to(torch.int16).view(torch.float16).float()
    inner = 0.79788456080286535587989211986876 * x * (1 + 0.044715 * x * x)
    return (0.5 * x * (1 + torch.tensor([tanhf(v) for v in inner.tolist()]))).half().float()


def table_gelu(x: Tensor) -> Tensor:
    """x float32 -> float32: 0 up to -10, x from 10 on, float16(gelu(float16(x))) between."""
    at = x.half().view(torch.int16).int() & 0xFFFF
    y = _table().to(x.device)[at]
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y))


class _TableGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return table_gelu(x.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grads[0], x, approximate="tanh")


class TableGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _TableGELU.apply(x))


def tanh_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose GELU, whatever its form, is named by that of the table."""
    keys = ("hidden_act", "activation_function", "hidden_activation")
    return {**config, **{key: "gelu_pytorch_tanh" for key in keys if config.get(key) in ("gelu", "gelu_fast")}}


def use_table_gelu(model: nn.Module) -> int:
    """Replace, in place, every GELU module of transformers; returns how many. The model's config then says tanh."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if f"{type(child).__module__}.{type(child).__qualname__}" in GELUS
    ]
    for parent, name in found:
        setattr(parent, name, TableGELU())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        was = config.to_dict()
        for key, value in tanh_form(was).items():
            if was[key] != value:
                setattr(config, key, value)
    return len(found)
