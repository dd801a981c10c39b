"""The same quantized values on another grid: narrower or wider codes, smaller blocks, another dtype of the scales.

Nothing is rounded. A block may be cut into smaller ones that repeat its scale, a zero point may be taken off the codes,
codes may move to a wider type, and scales to a dtype that holds every one of them; then the float32 weights are equal
bit for bit, which is checked. That is what carries a checkpoint that another tool made to a runtime with other grids.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qat.affine import QTensor, dequantize, tile, untile
from qat.frozen import FrozenWeight
from qat.scheme import QTYPES, STORED, QuantSpec, check_block, stored_dtype

GROUPS = (256, 128, 64, 32, 16)
Form = tuple[str, str | QuantSpec | None, Tensor, Tensor | None]  # qtype, offset, codes (R, C), offset's values


def regrid(
    w: FrozenWeight,
    refuse: Callable[[QuantSpec], str | None],
    refuse_values: Callable[[FrozenWeight], str | None],
) -> FrozenWeight | None:
    """`w` itself or the same weights on the first grid that is let pass, fewest bits first; None if none is.

    refuse: of a spec, why it does not fit; None if it does. refuse_values: the same of the very scales and offsets.
    """
    if refuse(w.tensor.spec) is None and refuse_values(w) is None:
        return w
    want = dequantize(w.tensor)
    for form in _forms(w.tensor):
        for spec in _specs(w.tensor, form):
            if refuse(spec) is not None:
                continue
            found = _on(w.tensor, form, spec)
            if found is None or not torch.equal(dequantize(found), want):
                continue
            moved = replace(w, tensor=found)
            if refuse_values(moved) is None:
                return moved
    return None


def signed_codes(q: QTensor) -> Tensor:
    """Codes less their zero point, int32 (R, C): what two ways to store the same weights have in common."""
    codes = q.codes.int()
    if q.spec.offset != "zero_point":
        return codes
    assert q.offset is not None
    return untile(tile(codes, q.spec.block) - q.offset.int()[..., None, None])


def spread(values: Tensor, q: QTensor, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Scales or offsets (R/r, C/c) of `q` repeated for each smaller block, (R/block rows, C/block columns)."""
    r, c = check_block((q.codes.shape[0], q.codes.shape[1]), q.spec.block)
    return values.repeat_interleave(r // block[0], 0).repeat_interleave(c // block[1], 1)


def _forms(q: QTensor) -> Iterator[Form]:
    """Ways to write the codes, fewest bits first."""
    spec = q.spec
    low = spec.type.qmin
    if spec.offset is not None and spec.offset != "zero_point":
        assert q.offset is not None
        yield spec.qtype, spec.offset, q.codes, q.offset
        for name in STORED:
            if name != spec.offset and _holds(q.offset, name):
                yield spec.qtype, name, q.codes, q.offset.to(STORED[name])
        return
    signed = signed_codes(q)
    extremes = int(signed.min()), int(signed.max())
    if spec.offset == "zero_point":
        assert q.offset is not None
        shift = 2 ** (spec.type.bits - 1)
        codes, zero = q.codes.int() - low, q.offset.int() - low
        yield f"uint{spec.type.bits}", "zero_point", codes, zero
        yield f"int{spec.type.bits}", "zero_point", codes - shift, zero - shift
        value = -zero.float() * q.scale.float()
        for name in ("float16", "bfloat16", "float32"):
            if _holds(value, name):
                yield f"uint{spec.type.bits}", name, codes, value.to(STORED[name])
    for t in QTYPES.values():
        if t.qmin < 0 and t.qmin <= extremes[0] and extremes[1] <= t.qmax:
            yield t.name, None, signed, None


def _specs(q: QTensor, form: Form) -> Iterator[QuantSpec]:
    """Specs for codes of this form: the block as it is or smaller, the scales as they are or in another dtype."""
    rows, cols = check_block((q.codes.shape[0], q.codes.shape[1]), q.spec.block)
    blocks = [q.spec.block, *((1, g) for g in GROUPS if cols % g == 0 and (rows, cols) != (1, g))]
    if cols == q.codes.shape[1]:
        blocks.insert(1, (1, -1))
    dtypes = [q.spec.scale, *(name for name in STORED if name != q.spec.scale and _holds(q.scale, name))]
    kind = {"offset": form[1], "range": "absmax" if form[1] is None else "minmax"}
    for block in blocks:
        for scale in dtypes:
            if isinstance(scale, str) and not isinstance(form[1], QuantSpec):
                yield QuantSpec(qtype=form[0], block=block, scale=scale, **kind)  # pyright: ignore[reportArgumentType]


def _holds(values: Tensor, name: str) -> bool:
    """Whether a stored dtype has every value, "portable" as float16 and as bfloat16."""
    exact = torch.equal(values.to(STORED[name]).float(), values.float())
    return exact and (name != "portable" or _holds(values, "bfloat16"))


def _on(q: QTensor, form: Form, spec: QuantSpec) -> QTensor | None:
    block = check_block((q.codes.shape[0], q.codes.shape[1]), spec.block)
    scale = spread(q.scale, q, block).to(stored_dtype(spec.scale)).contiguous()
    offset = None if form[3] is None else spread(form[3], q, block).contiguous()
    if offset is not None and offset.is_floating_point():
        assert isinstance(spec.offset, str)
        offset = offset.to(STORED[spec.offset])
    codes = form[2].to(spec.type.storage).contiguous()
    return QTensor(codes, scale, offset, spec)
