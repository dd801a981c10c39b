"""The arithmetic of quantization. Training, calibration, packing and verification all call these functions.

Shapes: x is (R, C); scale and offset are (R/r, C/c) where (r, c) is the block. All arithmetic is float32, whatever
the dtype of x; results are cast to the dtype of x last.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qat.rounding import cast, cast_normal, round_
from qat.scheme import Block, QuantSpec, check_block, stored_dtype

STRIP = 262144  # elements that `quantize` handles at a time, for each thread


class QParams(NamedTuple):
    """One block's grid: scale and offset (each (R/r, C/c)) in their stored dtypes; a zero point is int32.

    exact_scale, exact_offset: the float32 values before they were rounded for storage, kept only where the spec's
    `divide` asks for them; for the "reciprocal" rules exact_scale is the factor that x is multiplied with.
    A scale or offset that is quantized itself is kept as its float32 value.
    """

    scale: Tensor
    offset: Tensor | None = None
    exact_scale: Tensor | None = None
    exact_offset: Tensor | None = None


@dataclass(frozen=True)
class QTensor:
    """Codes (R, C) in the spec's storage dtype with everything needed to read them.

    value = scale * (code - offset) for an integer zero point, scale * code + offset for a floating one.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    spec: QuantSpec

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""
        return self.codes.shape

    def blank(self) -> "QTensor":
        """The same with codes that have no storage."""
        return replace(self, codes=self.codes.to("meta"))


def tile(x: Tensor, block: Block) -> Tensor:
    """(R, C) -> (R/r, C/c, r, c). Raises ValueError if the block does not divide the shape."""
    r, c = check_block((x.shape[0], x.shape[1]), block)
    return x.reshape(x.shape[0] // r, r, x.shape[1] // c, c).transpose(1, 2)


def untile(x: Tensor) -> Tensor:
    """(R/r, C/c, r, c) -> (R, C)."""
    nr, nc, r, c = x.shape
    return x.transpose(1, 2).reshape(nr * r, nc * c)


def store_scale(value: Tensor, stored: str | QuantSpec) -> Tensor:
    """A float32 scale (R/r, C/c) as it will be stored: never 0, in a dtype at least its smallest normal number, or of
    a quantized scale at least one step."""
    return cast_normal(value, stored) if isinstance(stored, str) else _store_quantized(value, stored, least=1.0)


def store_offset(value: Tensor, stored: str | QuantSpec) -> Tensor:
    """A float32 offset (R/r, C/c) as it will be stored."""
    return cast(value, stored) if isinstance(stored, str) else _store_quantized(value, stored, least=0.0)


def _store_quantized(value: Tensor, spec: QuantSpec, least: float) -> Tensor:
    """The float32 values nearest to `value` that codes of a magnitude of at least `least` can stand for."""
    grid = choose_qparams(value, spec)
    codes = to_codes(value, grid, spec)
    if spec.type.qmin < 0:
        sign = torch.where(tile(value, spec.block) * _spread(grid.scale.float()) < 0, -1.0, 1.0)
        codes = torch.where(codes.abs() < least, sign * least, codes)
    else:
        codes = codes.clamp(min=least)
    return from_codes(codes, grid.scale, None, spec, torch.float32)


def block_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(low, high), each (R/r, C/c) float32: what `qparams_from_range` needs to know of each block of x."""
    r, c = check_block((x.shape[0], x.shape[1]), spec.block)
    if x.stride(0) < x.stride(1) and 1 in (r, c):  # a transposed matrix: thirty times as fast in its own order
        low, high = block_range(x.t(), replace(spec, block=(c, r)))
        return low.t(), high.t()
    t = tile(x.float(), spec.block)
    low, high = t.amin((-1, -2)), t.amax((-1, -2))
    if spec.range == "signed_max":
        low = high = _extreme(t, low, high)
    return low, high


def _extreme(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Of each (r, c) the value of largest magnitude; of equal ones the first decides the sign, as in ggml."""
    extreme, anywhere = _larger(low, high), torch.compiler.is_compiling() or t.device.type != "cpu"
    tied = ... if anywhere else ((high == -low) & (high != 0)).nonzero(as_tuple=True)  # ten times as fast
    flat = t[tied].flatten(-2)
    extreme[tied] = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return extreme


def _larger(low: Tensor, high: Tensor) -> Tensor:
    """The one of larger magnitude, low of equal ones. Without a choice by element: signs that nobody can predict cost a
    CPU ten times the arithmetic."""
    return torch.maximum(high, -low).copysign(-(-low - high))


def qparams_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """The grid of a block that spans low..high (each (R/r, C/c) float32). A block of zeros gets scale 1."""
    q = spec.type
    offset: Tensor | None = None
    if spec.divide.startswith("reciprocal"):
        return _reciprocal(torch.maximum(high, -low), spec)
    if spec.range == "absmax":
        scale = torch.maximum(high, -low) / q.qmax
    elif spec.range == "one_signed":
        scale = _larger(low, high) / q.qmax
    elif spec.range == "absmax_half":
        scale = torch.maximum(high, -low) / ((q.qmax - q.qmin) / 2)
    elif spec.range == "signed_max":
        scale = _larger(low, high) / q.qmin
    elif spec.range in ("minmax", "minmax_zero"):
        if spec.range == "minmax_zero":
            low = low.clamp(max=0.0)
        if spec.offset == "zero_point":  # 0.0 must be a code
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale, offset = (high - low) / (q.qmax - q.qmin), low
    else:
        scale, offset = _mlx(low, high, q.qmax)
    if offset is not None and spec.range != "mlx" and spec.offset != "zero_point":
        offset = offset - scale * q.qmin  # before the next line: a constant block is its offset, with codes 0
    if isinstance(spec.scale, str):  # a quantized scale of 0 becomes one step, and must not raise its neighbours'
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    stored = store_scale(scale, spec.scale)
    exact = None if spec.divide.startswith("stored") else store_scale(scale, "float32")  # its inverse is finite
    if offset is None:
        return QParams(stored, None, exact)
    if spec.offset == "zero_point":
        zero = q.qmin - (offset / stored.float()).round()
        return QParams(stored, zero.nan_to_num(0.0).clamp(q.qmin, q.qmax).to(torch.int32), exact)
    assert spec.offset is not None
    return QParams(stored, store_offset(offset, spec.offset), exact, None if exact is None else offset)


def _reciprocal(largest: Tensor, spec: QuantSpec) -> QParams:
    """The runtimes' rule for activations: x is multiplied by qmax / max|x|, and the scale is not raised to a normal."""
    top = torch.full_like(largest, spec.type.qmax)  # a number over a tensor is computed as a product: two roundings
    factor = top / largest.clamp(min=2.0**-118)  # finite
    factor = torch.where(largest == 0, torch.zeros_like(factor), factor)
    scale = 1.0 / factor if spec.divide == "reciprocal_scale" else largest / spec.type.qmax
    return QParams(store_offset(torch.where(largest == 0, torch.ones_like(scale), scale), spec.scale), None, factor)


def _mlx(low: Tensor, high: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """MLX's affine rule: the edge of larger magnitude is exactly representable, and so is zero (mlx `quantize`)."""
    scale = ((high - low) / qmax).clamp(min=1e-7)
    low_wins = low.abs() > high.abs()
    scale = torch.where(low_wins, scale, -scale)
    edge = torch.where(low_wins, low, high)
    q0 = (edge / scale).round()
    scale = torch.where(q0 != 0, edge / q0, scale)
    return scale, torch.where(q0 != 0, edge, torch.zeros_like(edge))


def choose_qparams(x: Tensor, spec: QuantSpec) -> QParams:
    """The grid that the spec's range rule gives x (R, C)."""
    return qparams_from_range(*block_range(x, spec), spec)


def _spread(t: Tensor) -> Tensor:
    return t[..., None, None]


def quotients(
    x: Tensor, qparams: QParams, spec: QuantSpec, out: Tensor | None = None
) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """x (R, C) -> what is rounded, tiled float32, with the bounds it is clamped to: codes less the zero point.

    out: a tiled float32 tensor for the first, which is a new one otherwise.
    """
    q = spec.type
    scale = qparams.scale.float() if qparams.exact_scale is None else qparams.exact_scale
    y = tile(x.float(), spec.block)
    low: Tensor | float = q.qmin
    high: Tensor | float = q.qmax
    if spec.offset == "zero_point":
        assert qparams.offset is not None
        zero = _spread(qparams.offset.float())
        low, high = low - zero, high - zero
    elif spec.offset is not None:
        exact = qparams.exact_offset if qparams.exact_offset is not None else qparams.offset
        assert exact is not None
        y = torch.sub(y, _spread(exact.float()), out=out)
    if spec.divide.endswith("inverse"):
        return torch.mul(y, _spread(1.0 / scale), out=out), low, high
    return (torch.mul if spec.divide.startswith("reciprocal") else torch.div)(y, _spread(scale), out=out), low, high


def to_codes(x: Tensor, qparams: QParams, spec: QuantSpec, out: Tensor | None = None) -> Tensor:
    """x (R, C) -> tiled float32 codes, in `out` (tiled float32) if that is given."""
    y, low, high = quotients(x, qparams, spec, out)
    if spec.offset != "zero_point" or qparams.offset is None:
        return round_(y.clamp_(low, high), spec.rounding, spec.type.qmin)  # pyright: ignore
    steps = round_(y, spec.rounding, spec.type.qmin)  # clamped last, where the bounds are numbers, which is faster
    return steps.add_(_spread(qparams.offset.float())).clamp_(spec.type.qmin, spec.type.qmax)


def from_codes(codes: Tensor, scale: Tensor, offset: Tensor | None, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Tiled codes -> values (R, C) in `dtype`, computed in float32 and cast last."""
    if offset is None:
        y = codes.float() * _spread(scale.float())
    elif spec.offset == "zero_point":
        y = (codes.float() - _spread(offset.float())) * _spread(scale.float())
    else:
        y = codes.float() * _spread(scale.float()) + _spread(offset.float())
    return untile(y).to(dtype)


def refuse_infinite(x: Tensor, qparams: QParams, spec: QuantSpec, derived: bool = False) -> None:
    """Raise ValueError if x or its grid is not finite. derived: as of `quantize`."""
    scale, offset = (t is None or _finite(t) for t in (qparams.scale, qparams.offset))
    if derived and scale and offset:
        return
    if not _finite(x):
        raise ValueError("the tensor holds NaN or infinity")
    if not scale:
        raise ValueError(f"a scale is beyond the range of {spec.scale}: store scales as float32 or bfloat16")
    if not offset:
        raise ValueError(f"an offset is beyond the range of {spec.offset}: store offsets as float32 or bfloat16")


def _finite(t: Tensor) -> bool:
    """In one pass, without a copy; NaN spreads."""
    return not t.numel() or all(bool(torch.isfinite(end)) for end in t.detach().aminmax())


@torch.no_grad()
def quantize(x: Tensor, qparams: QParams, spec: QuantSpec, derived: bool = False) -> QTensor:
    """x (R, C) -> codes. Raises ValueError if x or its grid is not finite.

    derived: `qparams` is `choose_qparams(x, spec)`, which is finite only if x is: x is not looked through again.
    """
    refuse_infinite(x, qparams, spec, derived)
    x = x.detach()
    codes = torch.empty(x.shape, dtype=spec.type.storage, device=x.device)
    r, _ = check_block((x.shape[0], x.shape[1]), spec.block)
    whole = spec.block[0] == -1
    step = max(1, STRIP * torch.get_num_threads() // max(1, x.shape[1]))
    step = step if whole else max(r, step // r * r)
    buffer = torch.empty(min(step, x.shape[0]), x.shape[1], dtype=torch.float32, device=x.device)
    for i in range(0, x.shape[0], step):  # strips that stay in cache, without a fresh page for every step
        at = slice(None) if whole else slice(i // r, (i + step) // r)
        part = QParams(*(None if t is None else t[at] for t in qparams))  # pyright: ignore[reportArgumentType]
        strip = x[i : i + step]
        held = tile(buffer[: len(strip)], spec.block)
        codes[i : i + step] = untile(to_codes(strip, part, spec, held))
    offset = None if qparams.offset is None else qparams.offset.detach().contiguous()
    # a learned scale holds the stored value in float32, for its gradient
    return QTensor(codes, qparams.scale.detach().to(stored_dtype(spec.scale)).contiguous(), offset, spec)


def dequantize(q: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values (R, C) of a quantized tensor."""
    return from_codes(tile(q.codes, q.spec.block), q.scale, q.offset, q.spec, dtype)
