"""Where a run computes, and whether the memory there holds what training needs."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from qat.errors import UserError


def choose_device(trainer: partial[Any], console: Console) -> torch.device:
    """Where stages outside training run: the GPU that Lightning would take, else the CPU."""
    wants = trainer.keywords.get("accelerator", "auto")
    if wants in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        console.print(
            "[bold yellow]warning[/] this machine has an NVIDIA GPU but torch is a CPU-only build: "
            "install torch with CUDA from https://pytorch.org to train on it"
        )
    return torch.device("cpu")


def refuse_memory(model: nn.Module, trainer: partial[Any], device: torch.device) -> str:
    """What to say of the memory that training needs and that there is on `device`; "" for a run without training.

    Raises UserError if weights, gradients and AdamW's two moments alone do not fit. Strategies that spread these over
    several devices are not judged.
    """
    settings = trainer.keywords
    if settings["max_steps"] == 0:
        return ""
    need, free = training_nbytes(model, str(settings.get("precision"))), available(device)
    text = f"training needs {size(need)} for weights, gradients and optimizer"
    if free is None:
        return f"; {text}, and more for activations"
    there = free + sum(p.nbytes for p in model.parameters() if p.device.type == device.type)
    kind = "GPU memory" if device.type == "cuda" else "memory"
    if need > there and settings.get("strategy", "auto") == "auto":
        raise UserError(
            f"{text} alone, and {size(there)} of {kind} are there: take a smaller model or a larger machine, or "
            "trainer.max_steps=0 to quantize without training"
        )
    return f"; {text}, and more for activations, {size(there)} of {kind} are there"


def training_nbytes(model: nn.Module, precision: str) -> int:
    """Bytes of weights, gradients and AdamW's two moments, all in the dtype of the weights; without activations."""
    half = precision in ("bf16-true", "16-true")  # Lightning converts the model
    return sum(p.numel() * (2 if half else p.itemsize) * (4 if p.requires_grad else 1) for p in model.parameters())


def available(device: torch.device) -> int | None:
    """Bytes that a new program could have: free GPU memory, or RAM without what can be reclaimed; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass  # no Linux: all of the RAM, where that is known
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def size(n: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
