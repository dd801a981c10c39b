"""The nearest grid that fits where a block does not divide a weight: smaller blocks, then the targets' own grids."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from qat.scheme import Block, QuantSpec, bits_per_weight

GROUPS = (256, 128, 64, 32, 16)
Weight = tuple[str, str, tuple[int, ...], tuple[int, int]]  # name, kind, shape, (out, in)


def whole_block(spec: QuantSpec) -> Block:
    """(rows, columns) that must divide a weight: of quantized scales, as many weights as one scale of theirs spans."""
    nested = [s.block for s in (spec.scale, spec.offset) if isinstance(s, QuantSpec)]
    r, c = spec.block
    return r * max([b[0] for b in nested], default=1), c * max([b[1] for b in nested], default=1)


def divides(spec: QuantSpec, matrix: tuple[int, int]) -> bool:
    """Whether the blocks of `spec` divide a weight (out, in)."""
    try:
        bits_per_weight(spec, matrix)
    except ValueError:
        return False
    return True


def nearest(
    weights: Sequence[Weight], spec: QuantSpec, rule: int, targets: Sequence[str], config: dict[str, Any]
) -> str | None:
    """What to type to give all `weights`, which rule number `rule` (from 0) puts on `spec`, a grid that divides them
    and that every target holds; None if nothing near does."""
    fits = _fits(weights, targets, config)
    if isinstance(spec.scale, str) and not isinstance(spec.offset, QuantSpec):
        groups = (g for g in GROUPS if spec.block[1] == -1 or g < spec.block[1])
        for block in (*((1, g) for g in groups), (1, -1)):
            if fits(replace(spec, block=block)):
                return f"scheme.rules.{rule}.scheme.weight.block=[{block[0]},{block[1]}]"
    for target in targets:
        schemes: dict[str, QuantSpec] = getattr(import_module(f"qat.exporters.{target}"), "SCHEMES", {})
        for name in sorted(schemes, key=lambda n: _far(spec, schemes[n])):
            if fits(schemes[name]):
                return f"target=null scheme={name} export={target}"
    return None


def _fits(weights: Sequence[Weight], targets: Sequence[str], config: dict[str, Any]) -> Callable[[QuantSpec], bool]:
    modules = [import_module(f"qat.exporters.{t}") for t in targets]

    def fits(spec: QuantSpec) -> bool:
        return all(
            divides(spec, matrix) and all(m.refuse(name, kind, shape, spec, config) is None for m in modules)
            for name, kind, shape, matrix in weights
        )

    return fits


def _far(spec: QuantSpec, other: QuantSpec) -> tuple[int, bool]:
    """By the width of the codes, then whether both have an offset."""
    return abs(other.type.bits - spec.type.bits), (other.offset is None) != (spec.offset is None)
