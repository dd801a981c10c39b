"""What kind of difference lies between two weights that should be equal, and what it does to the values.

Pure functions of two weights, or of a quantized model and its float original. The kinds are those that exporters and
converters get wrong: a scale in another dtype or one unit in the last place off, zero points off by one, nibbles in
another order, a matrix transposed, rows in another runtime's rotary order, columns sorted by importance.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.affine import QTensor
from qat.code_orders import code_order
from qat.frozen import Frozen, FrozenWeight
from qat.regrid import signed_codes, spread


class Finding(NamedTuple):
    """kind: one or two words for programs. text: the difference in words, with its effect in decibels."""

    kind: str
    text: str


def identical(have: FrozenWeight, want: FrozenWeight) -> bool:
    """Whether all that the weights are made of is the very same: then they are, without making them."""
    a, b = have.tensor, want.tensor

    def layout(w: FrozenWeight) -> tuple[object, ...]:
        q = w.tensor
        kind = None if q.offset is None else q.spec.offset == "zero_point"
        return w.shape, w.kind == "Conv1D", q.codes.shape, q.codes.dtype, q.scale.shape, kind

    def same(x: Tensor | None, y: Tensor | None) -> bool:
        return x is y or (x is not None and y is not None and torch.equal(x.float(), y.float()))

    equal = layout(have) == layout(want) and torch.equal(a.codes, b.codes)
    return equal and same(a.scale, b.scale) and same(a.offset, b.offset)


def weights(have: FrozenWeight, want: FrozenWeight) -> Finding | None:
    """How `have` differs from `want`; None if it stores the same codes, scales and offsets, or says them otherwise."""
    have, want = _alike(have, want), _alike(want, have)
    a, b = have.tensor, want.tensor
    if a.codes.shape != b.codes.shape:
        turned = a.codes.shape == b.codes.shape[::-1] and torch.equal(signed_codes(a).t(), signed_codes(b))
        if turned:
            return Finding("transposition", f"the matrix is transposed: {tuple(a.codes.shape)}{_swapped(have, want)}")
        if said := _turned(have.dequantize(), want.dequantize()):
            return Finding("transposition", said)
        return Finding("shape", f"the codes have shape {tuple(a.codes.shape)}, not {tuple(b.codes.shape)}")
    codes = _codes(have, want)
    if codes is not None:
        return Finding(codes.kind, f"{codes.text}{effect(have.dequantize(), want.dequantize())}")
    found = _scales(spread(a.scale, a), spread(b.scale, b), a.scale.dtype) or _offsets(have, want)
    if found is None:
        return None
    return Finding(found.kind, f"the codes are equal but {found.text}{effect(have.dequantize(), want.dequantize())}")


def floats(have: Tensor, want: Tensor) -> Finding | None:
    """How an unquantized parameter differs; None if it does not, whatever the dtypes."""
    a, b = have.float(), want.float()
    if a.shape != b.shape:
        if a.ndim == 2 and torch.equal(a.t(), b):
            return Finding("transposition", f"the matrix is transposed: {tuple(a.shape)}, not {tuple(b.shape)}")
        return Finding("shape", f"the shape is {tuple(a.shape)}, not {tuple(b.shape)}")
    if torch.equal(a, b):
        return None
    if a.ndim == 2 and a.shape[0] == a.shape[1] and torch.equal(a.t(), b):
        return Finding("transposition", f"the matrix is transposed{effect(a, b)}")
    if (dtype := _rounded(a, b)) is not None:
        return Finding("dtype", f"the unquantized values differ: they are rounded to {dtype}{effect(a, b)}")
    if torch.equal(a - 1, b) or torch.equal(a, b + 1):
        larger = "all are larger by one, as Gemma's norms are in GGUF"
        return Finding("offset", f"the unquantized values differ: {larger}{effect(a, b)}")
    if (order := _row_order(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1))) is not None:
        return Finding("row order", f"{order}{effect(a, b)}")
    return Finding("values", f"the unquantized values differ{effect(a, b)}")


def against_float(written: Frozen, original: Frozen) -> tuple[dict[str, Any], list[str]]:
    """How far every weight is from the unquantized model it was made of: figures worst (its name), worst_sqnr and
    mean_sqnr in dB of the quantized ones, rounded_floats (how many others are rounded to 16 bits), and what is wrong.

    An error as large as the weight itself (0 dB) is no rounding: then it is another weight, or in another order.
    """
    values = {**original.floats, **{alias: original.floats[name] for alias, name in original.ties.items()}}
    wrong: list[str] = []
    found: dict[str, float] = {}
    rounded = 0
    for name, w in written.weights.items():
        if name not in values:
            wrong.append(f"{name} is in the file but not in the original")
            continue
        have, want = w.dequantize(), values[name].float()
        found[name] = sqnr(have, want) if have.shape == want.shape else -math.inf
        if found[name] <= 0:
            turned = _turned(have, want)
            wrong.append(f"{name} is not the original's, rounded{effect(have, want)}{turned and f': {turned}'}")
    for name, have in written.floats.items():
        if name not in values:
            if have.any():  # AutoGPTQ writes biases of zeros
                wrong.append(f"{name} is in the file but not in the original")
        elif (differs := floats(have, values[name])) and differs.kind == "dtype":
            rounded += 1
        elif differs:
            wrong.append(f"{name}: {differs.text}")
    held = {*written.weights, *written.floats, *original.ties}
    wrong += [f"{name} is missing from the file" for name in sorted(values.keys() - held)]
    worst = min(found, key=lambda name: found[name], default="no weight is quantized")
    mean = sum(found.values()) / len(found) if found else math.inf
    figures = {"worst": worst, "worst_sqnr": found.get(worst, math.inf), "mean_sqnr": mean, "rounded_floats": rounded}
    return figures, wrong


def effect(have: Tensor, want: Tensor) -> str:
    """How large a difference is, in decibels of signal over it; "" if there is none."""
    if have.shape != want.shape:
        return f" in shape: {tuple(have.shape)}, not {tuple(want.shape)}"
    found = sqnr(have, want)
    return "" if math.isinf(found) and found > 0 else f" ({found:.1f} dB SQNR)"


def sqnr(have: Tensor, want: Tensor) -> float:
    """Signal to quantization noise in dB, in float64; infinite for equal values, minus infinite for a lost signal."""
    noise = float((have.double() - want.double()).square().sum())
    signal = float(want.double().square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _from_zero(w: FrozenWeight) -> Tensor:
    return w.tensor.codes.int() - w.tensor.spec.type.qmin


def _turned(have: Tensor, want: Tensor) -> str:
    """That a matrix is much nearer to another one transposed than to it, in words; "" if it is not."""
    if have.ndim != 2 or have.shape != want.shape[::-1]:
        return ""
    found, plain = sqnr(have, want.t()), sqnr(have, want) if have.shape == want.shape else -math.inf
    if found < max(plain, 0.0) + 3:
        return ""
    return f"the matrix is transposed, and was quantized so: {found:.1f} dB SQNR to the transposed one"


def _alike(w: FrozenWeight, other: FrozenWeight) -> FrozenWeight:
    """A symmetric weight with codes from 0 on and a floating offset, where the other has that; else as it is."""
    q, spec = w.tensor, other.tensor.spec
    if q.offset is not None or spec.offset in (None, "zero_point") or spec.type.bits != q.spec.type.bits:
        return w
    low = q.spec.type.qmin
    said = replace(q.spec, qtype=f"uint{q.spec.type.bits}", range="minmax", scale="float32", offset="float32")
    codes = (q.codes.int() - low).to(torch.uint8)
    return replace(w, tensor=QTensor(codes, q.scale, q.scale.float() * low, said))


def _swapped(have: FrozenWeight, want: FrozenWeight) -> str:
    a, b = have.dequantize(), want.dequantize()
    return "" if a.shape == b.shape else effect(a.t(), b)


def _codes(have: FrozenWeight, want: FrozenWeight) -> Finding | None:
    a, b = signed_codes(have.tensor), signed_codes(want.tensor)
    if torch.equal(a, b):
        return None
    if torch.equal(have.tensor.codes.int(), want.tensor.codes.int()):
        return _offsets(have, want) or Finding("zero point", "the codes are equal but one has a zero point")
    shift = a - b
    if bool((shift == shift.flatten()[0]).all()):
        return Finding("codes", f"every code is larger by {int(shift.flatten()[0])}: signed codes read as unsigned")
    if torch.equal(a, -b):
        return Finding("codes", "every code has the other sign")
    if a.shape[0] == a.shape[1] and torch.equal(a.t(), b):
        return Finding("transposition", "the matrix is transposed")
    bits, others = have.tensor.spec.type.bits, want.tensor.spec.type.bits
    if bits == others and (said := code_order(_from_zero(have), _from_zero(want), bits)):
        return Finding("nibble order", said)
    if (order := _row_order(a, b)) is not None:
        return Finding("row order", order)
    if _same_rows(a.t(), b.t()):
        return Finding("column order", "the columns are in another order (GPTQ's act-order sorts them so)")
    if said := _turned(have.dequantize(), want.dequantize()):
        return Finding("transposition", said)
    count, most = int((shift != 0).sum()), int(shift.abs().max())
    return Finding("codes", f"{count} of {b.numel()} codes differ, by {most} at most")


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether a (R, C) has the rows of b in some order: both sorted by one random, fixed, weighted sum."""
    weight = torch.rand(a.shape[1], 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = (t[(t.double() * weight.t()).sum(1).argsort(stable=True)] for t in (a, b))
    return torch.equal(x, y)


def _row_order(a: Tensor, b: Tensor) -> str | None:
    """Which order of rows turns b (R, C) into a; None if none does."""
    if not _same_rows(a, b):
        return None
    for dim in range(4, len(a) + 1, 2):
        if len(a) % dim == 0:
            halves = torch.arange(len(a)).reshape(-1, 2, dim // 2).transpose(1, 2).flatten()
            for order, said in ((halves, "neighbours, as llama.cpp rotates"), (halves.argsort(), "halves, as HF does")):
                if torch.equal(a, b[order]):
                    return f"the rows are in another rotary order (heads of {dim}): {said}"
    return "the rows are in another order"


def _rounded(have: Tensor, want: Tensor) -> str | None:
    """The 16-bit dtype that `want` was rounded to, to give `have`."""
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return next((said for dtype, said in names.items() if torch.equal(want.to(dtype).float(), have.float())), None)


def _scales(have: Tensor, want: Tensor, stored: torch.dtype) -> Finding | None:
    """Of two tensors of scales, one for each weight."""
    a, b = have.float(), want.float()
    if torch.equal(a, b):
        return None
    if (dtype := _rounded(a, b)) is not None:
        return Finding("scale dtype", f"the stored scales differ: they are rounded to {dtype}")
    wrong = a != b
    share = f"{int(wrong.sum())} of {wrong.numel()} weights have another scale"
    if bool((_steps(a, b, stored)[wrong] <= 1).all()):
        name = str(stored).removeprefix("torch.")
        return Finding("scale ulp", f"the stored scales differ: {share}, off by one unit in the last place of {name}")
    ratio = (a / b)[b != 0]
    if len(ratio) and float(ratio.max() - ratio.min()) <= 1e-3 * float(ratio.abs().max()):
        return Finding("scale", f"the stored scales differ by a factor of {float(ratio.mean()):.5g}")
    if torch.equal(a.flatten().sort().values, b.flatten().sort().values):
        return Finding("scale order", "the stored scales are in another order")
    return Finding("scale", f"the stored scales differ: {share}")


def _steps(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """How many representable numbers of a dtype lie between a and b: int64."""
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]

    def ordered(x: Tensor) -> Tensor:
        bits = x.to(dtype).contiguous().view(whole).long()
        return torch.where(bits < 0, -(bits & torch.iinfo(whole).max), bits)

    return (ordered(a) - ordered(b)).abs()


def _offsets(have: FrozenWeight, want: FrozenWeight) -> Finding | None:
    a, b = have.tensor, want.tensor
    if "zero_point" not in (a.spec.offset, b.spec.offset) and (a.offset is None) != (b.offset is None):
        return Finding("offset", "one has an offset and the other has none")
    if a.offset is None or b.offset is None:  # a zero point against signed codes: the codes are compared without it
        return None
    x, y = spread(a.offset, a).float(), spread(b.offset, b).float()
    if torch.equal(x, y) or (a.spec.offset == b.spec.offset == "zero_point" and not torch.equal(a.codes, b.codes)):
        return None
    shift = x - y
    if a.spec.offset == "zero_point" and bool((shift.abs() == 1).all()):
        return Finding("zero point", "every zero point is off by one, as between versions 1 and 2 of GPTQ")
    if (dtype := _rounded(x, y)) is not None:
        return Finding("offset dtype", f"the stored offsets differ: they are rounded to {dtype}")
    return Finding("offset", f"the stored offsets differ, for {int((shift != 0).sum())} of {shift.numel()} weights")
