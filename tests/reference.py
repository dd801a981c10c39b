"""An oracle for qat.affine in numpy: the same definitions written again, from QuantSpec's docstring, without torch.

float32 in numpy is IEEE arithmetic one operation at a time; rounding to bfloat16 is done on the bits, to float16 by
numpy's own cast. Also the test inputs: integers from PCG64, so that they are the same everywhere and for good.
"""

import itertools

import numpy as np

from qat.scheme import DIVISORS, QTYPES, RANGES, ROUNDINGS, STORED, QuantSpec

BLOCKS = ((-1, -1), (1, -1), (1, 8), (4, 16), (-1, 1))
F32_TINY = np.float32(2.0**-126)


def valid_specs(blocks=BLOCKS) -> list[QuantSpec]:
    """Every combination that QuantSpec accepts."""
    out = []
    for qtype, block, rng, rounding, divide, scale, offset in itertools.product(
        QTYPES, blocks, RANGES, ROUNDINGS, DIVISORS, STORED, (None, "zero_point", *STORED)
    ):
        try:
            spec = QuantSpec(
                qtype=qtype, block=block, range=rng, rounding=rounding, divide=divide, scale=scale, offset=offset
            )
        except ValueError:
            continue
        out.append(spec)
    return out


def integers(shape: tuple[int, int], seed: int, exponent: int = -20) -> np.ndarray:
    """float32 (R, C), roughly normal with deviation near 2**(exponent + 17): sums of four 16-bit integers, exact."""
    raw = np.random.PCG64(seed).random_raw(shape[0] * shape[1])
    parts = sum(((raw >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return np.ldexp((parts - 2 * 0xFFFF).astype(np.float32), exponent).reshape(shape)


def bfloat16(v: np.ndarray) -> np.ndarray:
    bits = v.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def stored(v: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 value of v in a stored dtype."""
    with np.errstate(over="ignore"):
        if dtype in ("bfloat16", "portable"):
            v = bfloat16(v)
        return v.astype(np.float16).astype(np.float32) if dtype in ("float16", "portable") else v


def stored_scale(v: np.ndarray, dtype: str) -> np.ndarray:
    tiny = np.float32(2.0**-14) if dtype in ("float16", "portable") else F32_TINY
    return stored(np.where(np.abs(v) < tiny, np.where(v < 0, -tiny, tiny), v), dtype)


def to_blocks(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(R, C) -> (R/r, C/c, r*c), by slicing."""
    r = x.shape[0] if block[0] == -1 else block[0]
    c = x.shape[1] if block[1] == -1 else block[1]
    rows = [[x[i : i + r, j : j + c].reshape(-1) for j in range(0, x.shape[1], c)] for i in range(0, x.shape[0], r)]
    return np.array(rows)


def from_blocks(t: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    r = shape[0] if block[0] == -1 else block[0]
    c = shape[1] if block[1] == -1 else block[1]
    out = np.empty(shape, t.dtype)
    for i, j in itertools.product(range(t.shape[0]), range(t.shape[1])):
        out[i * r : (i + 1) * r, j * c : (j + 1) * c] = t[i, j].reshape(r, c)
    return out


def round_codes(y: np.ndarray, rounding: str, qmin: int) -> np.ndarray:
    if rounding == "half_even":
        return np.rint(y)
    if rounding == "toward_zero":
        return np.trunc(y)
    if rounding == "half_up":
        return np.floor((y + np.float32(0.5 - qmin)).astype(np.float32)) + qmin
    exact = y.astype(np.float64)
    return np.sign(exact) * np.floor(np.abs(exact) + 0.5)


def quantize(x: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """codes (R, C) int64, the float32 value of each stored scale and offset (R/r, C/c), and the values (R, C)."""
    one = np.float32(1)
    q = spec.type
    t = to_blocks(x.astype(np.float32), spec.block)
    low, high = t.min(-1), t.max(-1)
    offset: np.ndarray | None = None
    if spec.range == "absmax":
        scale = np.abs(t).max(-1) / np.float32(q.qmax)
    elif spec.range == "absmax_half":
        scale = np.abs(t).max(-1) / np.float32((q.qmax - q.qmin) / 2)
    elif spec.range == "signed_max":
        first = np.abs(t).argmax(-1)
        scale = np.take_along_axis(t, first[..., None], -1)[..., 0] / np.float32(q.qmin)
    elif spec.range == "one_signed":
        scale = np.where(np.abs(high) > np.abs(low), high, low) / np.float32(q.qmax)
    elif spec.range in ("minmax", "minmax_zero"):
        if spec.range == "minmax_zero":
            low = np.minimum(low, np.float32(0))
        if spec.offset == "zero_point":
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        scale = (high - low) / np.float32(q.qmax - q.qmin)
        offset = low - scale * np.float32(q.qmin)
    else:
        scale = np.maximum((high - low) / np.float32(q.qmax), np.float32(1e-7))
        scale = np.where(np.abs(high) >= np.abs(low), -scale, scale)
        offset = np.where(np.abs(high) >= np.abs(low), high, low)
        q0 = np.rint(offset / scale)
        scale = np.where(q0 == 0, scale, offset / np.where(q0 == 0, one, q0))
        offset = np.where(q0 == 0, np.float32(0), offset)
    largest = np.abs(t).max(-1)
    factor = np.where(largest == 0, np.float32(0), np.float32(q.qmax) / np.maximum(largest, np.float32(2.0**-118)))
    if spec.divide == "reciprocal_scale":
        scale = one / np.where(factor == 0, one, factor)
    scale = np.where(scale == 0, one, scale)
    kept = stored(scale, spec.scale) if spec.divide.startswith("reciprocal") else stored_scale(scale, spec.scale)
    divisor = kept if spec.divide.startswith("stored") else stored_scale(scale, "float32")
    zero = np.zeros_like(kept)
    shift = np.zeros_like(kept)
    if spec.offset == "zero_point":
        zero = np.clip(q.qmin - np.rint(low / kept), q.qmin, q.qmax).astype(np.float32)
        kept_offset = zero
    elif offset is not None:
        kept_offset = stored(offset, str(spec.offset))
        shift = kept_offset if spec.divide.startswith("stored") else offset
    else:
        kept_offset = None
    y = t - shift[..., None]
    if spec.divide.startswith("reciprocal"):
        y = y * factor[..., None]
    else:
        y = y * (one / divisor)[..., None] if spec.divide.endswith("inverse") else y / divisor[..., None]
    assert y.dtype == np.float32
    wide = np.clip(y, np.float32(-1e6), np.float32(1e6))  # far outside every range of codes: rounding cannot overflow
    codes = np.clip(round_codes(wide, spec.rounding, q.qmin) + zero[..., None], q.qmin, q.qmax).astype(np.float32)
    values = (codes - zero[..., None]) * kept[..., None]
    if spec.offset not in (None, "zero_point"):
        values = codes * kept[..., None] + kept_offset[..., None]
    values = values.astype(np.float32)
    shape = (x.shape[0], x.shape[1])
    return (
        from_blocks(codes.astype(np.int64), spec.block, shape),
        kept,
        kept_offset,
        from_blocks(values, spec.block, shape),
    )
