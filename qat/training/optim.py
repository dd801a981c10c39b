"""AdamW with the parameter groups that QAT needs, and one schedule: linear warm-up, then cosine."""

import math
from typing import Any

import torch
from torch import nn

from qat.errors import UserError, at_least
from qat.quantizers.base import FakeQuantize

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Optimizer:
    """`optimizer=` in a recipe. Learned quantizer state gets lr * scale_lr; it, norms and biases get no decay."""

    def __init__(
        self,
        *,
        lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        warmup_steps: int = 0,
        min_lr_ratio: float = 0.1,
        scale_lr: float = 1.0,
    ) -> None:
        named = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "min_lr_ratio": min_lr_ratio, "scale_lr": scale_lr}
        for name, value in {**named, "warmup_steps": warmup_steps}.items():
            at_least(f"optimizer.{name}", value, 0)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"optimizer.betas={list(betas)} is not possible; give two numbers from 0 to below 1")
        self.lr, self.weight_decay, self.eps = lr, weight_decay, eps
        self.betas = (betas[0], betas[1])  # YAML gives a list
        self.warmup_steps, self.min_lr_ratio, self.scale_lr = warmup_steps, min_lr_ratio, scale_lr

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """The optimiser and its per-step schedule over `total_steps`, in the form Lightning takes."""
        decayed, plain, scales = groups(model)
        named = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
            {"params": scales, "weight_decay": 0.0, "lr": self.lr * self.scale_lr},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in named if group["params"]], lr=self.lr, betas=self.betas, eps=self.eps, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: factor(step, self.warmup_steps, total_steps, self.min_lr_ratio)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def factor(step: int, warmup: int, total: int, floor: float) -> float:
    """Multiple of the peak rate at 0-based `step`: up to 1 over `warmup` steps, down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed, learned quantizer state), each trainable parameter once, in the model's order."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    learned = {id(p) for module in quantizers for p in module.parameters()}
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in learned:
            scales.append(parameter)
        elif id(parameter) in norms or name.endswith("bias") or parameter.ndim < 2:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    return decayed, plain, scales


def _is_norm(module: nn.Module) -> bool:
    # transformers writes its own norm classes (LlamaRMSNorm, ...), which share no base class with torch's
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")
