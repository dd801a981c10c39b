"""Reading a file that anyone may have written: it is sound, and holds what its grid says, or it is refused.

Every target's own `read` is called here. It need not foresee how a file can be damaged: what it raises, whatever that
is, becomes a VerifyError.
"""

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qat.errors import VerifyError, understood
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import check_block, matrix


def read(module: ModuleType, path: Path) -> Frozen:
    """What a target's file holds. Raises UserError if it is none of that target's, VerifyError if it is damaged."""
    with understood(path):
        frozen = module.read(path)
        refuse_unsound(frozen, path)
    return frozen


def refuse_unsound(frozen: Frozen, path: Path) -> None:
    """Raises VerifyError naming the first tensor that no writer could have meant: of another shape than its grid's,
    or with a NaN or an infinity, which would spread to every output."""
    named = [(name, _unsound_float(value)) for name, value in frozen.floats.items()]
    for name, w in frozen.weights.items():
        with understood(f"{path}: {name}"):
            named.append((name, _unsound_weight(w)))
    named += [(f"the input of {module}", _unsound_input(i)) for module, i in frozen.inputs.items()]
    held = {*frozen.weights, *frozen.floats}
    named += [(alias, f"is tied to {to}, which is not there") for alias, to in frozen.ties.items() if to not in held]
    for name, why in named:
        if why:
            raise VerifyError(f"{path}: {name}: it {why}")


def _unsound_float(value: Tensor) -> str | None:
    whole = not value.is_floating_point() or value.dtype.itemsize == 1 or bool(torch.isfinite(value).all())
    return None if whole else "holds NaN or infinite values"


def _unsound_weight(w: FrozenWeight) -> str | None:
    q = w.tensor
    want = matrix(w.kind, w.shape)
    if tuple(q.codes.shape) != want:
        return f"has codes of shape {tuple(q.codes.shape)}, not {want}"
    r, c = check_block(want, q.spec.block)
    grid = (want[0] // r, want[1] // c)
    if (q.offset is None) != (q.spec.offset is None):
        return (
            f"is on grid {q.spec.label()}, but its offsets or zero points are {'not ' if q.offset is None else ''}there"
        )
    for said, part in (("scales", q.scale), ("offsets", q.offset)):
        if part is not None and tuple(part.shape) != grid:
            return f"has {said} of shape {tuple(part.shape)}, not {grid}"
        if part is not None and (why := _unsound_float(part)):
            return f"{why} in its {said}"
    low, high = (int(x) for x in q.codes.aminmax())
    if low < q.spec.type.qmin or high > q.spec.type.qmax:
        return f"has codes from {low} to {high}, not of {q.spec.qtype}"
    return None


def _unsound_input(i: FrozenInput) -> str | None:
    if not isinstance(i.static, bool) or i.static != (i.scale is not None):
        return "is static without a scale, or dynamic with one"
    if i.scale is None:
        return None
    if tuple(i.scale.shape) != (1, 1) or (i.offset is None) != (i.spec.offset is None):
        return f"has a scale or zero point that is not of grid {i.spec.label()}"
    return _unsound_float(i.scale)
