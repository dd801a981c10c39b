"""Round-to-nearest and truncation: post-training quantization without data, the baseline of everything else."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from qat.affine import QParams, choose_qparams
from qat.conversion import prepare
from qat.quantizers.fixed import Fixed
from qat.scheme import Block, QuantSpec, Rule


def quantize_model(
    model: nn.Module,
    rules: Sequence[Rule],
    init: Callable[[Tensor, QuantSpec], QParams] = choose_qparams,
) -> nn.Module:
    """Give the layers that `rules` name a fixed grid, in place; returns the model, ready to evaluate or convert.

    init chooses the grid: `choose_qparams` (the spec's own rule) or `qat.ptq.mse.search`. Raises UserError as
    `prepare` does.
    """
    return prepare(model, rules, weight=partial(Fixed, init=init))


def baselines(bits: int, block: Block) -> dict[str, QuantSpec]:
    """The classical grids of a width, by name: absmax and zero-point, rounded to nearest and truncated.

    block: (-1, -1) tensor, (1, -1) channel, (1, n) group.
    """
    out: dict[str, QuantSpec] = {}
    for how, rounding in (("nearest", "half_even"), ("truncated", "toward_zero")):
        out[f"absmax {how}"] = QuantSpec(qtype=f"int{bits}", block=block, rounding=rounding)
        out[f"zero-point {how}"] = QuantSpec(
            qtype=f"uint{bits}", block=block, range="minmax", offset="zero_point", rounding=rounding
        )
    return out
