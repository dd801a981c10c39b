"""How far evaluations of one simulation lie apart that are all valid: no runtime can be held to less.

Three kinds: the sums of every layer in float64; in float32, but in another order; and with every input that a layer
rounds moved by at most one unit in its last place, as another exp, norm or attention moves it. Where activations are
rounded, each of them flips codes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.modules.base import QuantLayer

SEEDS = 2  # orders, and moves


@contextmanager
def reordered(seed: int) -> Iterator[None]:
    """Every linear layer sums its products in a random order."""
    linear = F.linear

    def other(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(seed))
        return linear(x[..., order], w[:, order], bias)

    F.linear = other
    try:
        yield
    finally:
        F.linear = linear


@contextmanager
def moved(net: nn.Module, seed: int) -> Iterator[None]:
    """Every float input of a quantized layer is its neighbour below, itself, or its neighbour above, by chance."""
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0]
        if not x.is_floating_point():
            return given
        to = torch.randint(-1, 2, x.shape, generator=generator) * torch.tensor(torch.inf)  # -inf, nan or inf
        return (torch.where(to.isnan(), x, torch.nextafter(x, to.to(x.dtype))), *given[1:])

    hooks = [m.register_forward_pre_hook(move) for m in net.modules() if isinstance(m, QuantLayer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def others(net: nn.Module, ask: Callable[[nn.Module], Tensor]) -> dict[str, list[Tensor]]:
    """`ask(net)`, float32, once more for each evaluation: by its kind, "float64", "order" or "last bit"."""
    found = {"float64": [ask(copy.deepcopy(net).double()).float()], "order": [], "last bit": []}
    for seed in range(SEEDS):
        with reordered(seed):
            found["order"].append(ask(net))
        with moved(net, seed):
            found["last bit"].append(ask(net))
    return found


def spreads(want: Tensor, found: dict[str, list[Tensor]], largest: float) -> dict[str, float]:
    """By kind, the median distance [prompts, V] of the others from `want`, as a share of the largest logit."""
    return {k: float(torch.stack([(o - want).abs().amax(-1) / largest for o in v]).median()) for k, v in found.items()}


def step(want: Tensor, largest: float) -> float:
    """What one float32 step of the largest of these log-probabilities is, as a share of the largest logit: a runtime
    that reports log-probabilities reports no less."""
    top = want.abs().max()
    return float((torch.nextafter(top, top.new_tensor(torch.inf)) - top) / largest)
