"""llama.cpp's GELU on a CPU: a table from float16 to float16 of the tanh form (ggml vec.h), with GELU's own gradient."""

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


def table_gelu(x: Tensor) -> Tensor:
    """x float32 -> float32: 0 up to -10, x from 10 on, float16(gelu(float16(x))) between."""
    h = x.half().float()
    y = 0.5 * h * (1 + torch.tanh(0.79788456080286535587989211986876 * h * (1 + 0.044715 * h * h)))
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y.half().float()))


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


def use_table_gelu(model: nn.Module) -> int:
    """Replace, in place, every GELU module of transformers; returns how many."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if f"{type(child).__module__}.{type(child).__qualname__}" in GELUS
    ]
    for parent, name in found:
        setattr(parent, name, TableGELU())
    return len(found)
