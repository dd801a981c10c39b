"""What the numbers are: sets of codes, how one tensor is quantized, and which layers get which. Imports nothing of qat.

A value is `scale * (code - zero_point)`, or `scale * code + offset` with a floating offset; one scale (and offset)
per block. Scales and offsets may be quantized themselves (two levels, as in ggml's K-quants). Every other file reads
these dataclasses; none of them decides anything about the numbers itself.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, get_args

import torch

Block = tuple[int, int]  # (rows, cols) that share one scale; -1 = the whole axis

RANGES = ("absmax", "absmax_half", "signed_max", "minmax", "minmax_zero", "one_signed", "mlx")
OFFSET_RANGES = ("minmax", "minmax_zero", "mlx")  # these need an offset; the others take none
ROUNDINGS = ("half_even", "half_away", "half_up", "toward_zero")
DIVISORS = ("stored", "exact", "stored_inverse", "exact_inverse", "reciprocal", "reciprocal_scale")
STORED: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "portable": torch.float16,  # rounded to bfloat16 inside float16's normal range: exact in both
}


@dataclass(frozen=True)
class QType:
    """A set of codes: the integers qmin..qmax, kept unpacked in `storage`."""

    name: str
    bits: int
    qmin: int
    qmax: int
    storage: torch.dtype


def _integer(bits: int, signed: bool) -> QType:
    low = -(2 ** (bits - 1)) if signed else 0
    name = f"{'' if signed else 'u'}int{bits}"
    return QType(name, bits, low, low + 2**bits - 1, torch.int8 if signed else torch.uint8)


QTYPES: dict[str, QType] = {t.name: t for t in (_integer(b, s) for b in range(2, 9) for s in (True, False))}
QTYPES["ternary"] = QType("ternary", 2, -1, 1, torch.int8)


def _check(what: str, value: object, allowed: "tuple[str, ...] | dict[str, Any]") -> None:
    if value not in allowed:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor (R, C) is quantized.

    qtype     the codes, by name ("int4", "uint8", "ternary", ...).
    block     (rows, cols) sharing a scale: (-1, -1) tensor, (1, -1) channel (or token, for activations flattened to
              rows), (1, 32) group, (16, 16) 2-D block.
    range     from the block's values to its scale: "absmax" max|x| / qmax; "absmax_half" max|x| / half the code range
              (7.5 for int4: torchao, compressed-tensors); "signed_max" the signed extreme / qmin (ggml Q4_0; the
              scale may be negative); "minmax" (max - min) / (qmax - qmin), its floating offset the minimum;
              "minmax_zero" the same with the minimum at most 0 (ggml K-quants); "mlx" min-max with the larger edge
              exact; "one_signed" extreme / qmax for values of one sign, as most scales and minima are.
    rounding  of x / scale; "half_up" is ggml's floor(y - qmin + 0.5) + qmin, the sum rounded to float32.
    divide    what x is divided by: the "stored" scale, the "exact" (unrounded) one, or a product with the float32
              reciprocal of either ("stored_inverse": torchao; "exact_inverse": ggml); "reciprocal": a product with
              the float32 qmax / max|x| (llama.cpp's and vLLM's activations), "reciprocal_scale": the same, and the
              scale is that number's own float32 reciprocal (ggml Q8_K). Both keep subnormal float16 scales.
    scale     the dtype in which scales are stored; "portable" is exact in float16 and in bfloat16. Or the QuantSpec
              of the scales themselves, whose block counts scales, not weights.
    offset    None (symmetric), "zero_point" (an integer code that stands for 0.0), or the stored dtype of a floating
              offset, or the QuantSpec of the offsets.
    block_sum for inputs of weights with a floating offset: the dtype in which a runtime keeps the sum of each block,
              which it multiplies with the offset (ggml Q8_1: float16). None: the exact sum.
    integer_dot  for inputs with one scale a row: evaluation multiplies the codes, exactly, and scales their sum by the
              input's scale, then the weight's (torchao's int8 kernels). False: the product of the values.
    Raises ValueError for a name that does not exist or a combination that has no meaning.
    """

    qtype: str
    block: Block = (1, -1)
    range: str = "absmax"
    rounding: str = "half_even"
    divide: str = "stored"
    scale: "str | QuantSpec" = "portable"
    offset: "str | QuantSpec | None" = None
    block_sum: str | None = None
    integer_dot: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        _check("qtype", self.qtype, QTYPES)
        _check("range", self.range, RANGES)
        _check("rounding", self.rounding, ROUNDINGS)
        _check("divide", self.divide, DIVISORS)
        for what, stored in (("scale", self.scale), ("offset", self.offset)):
            if isinstance(stored, QuantSpec):
                self._check_nested(what, stored)
            elif what == "scale" or stored not in (None, "zero_point"):
                _check(what, stored, STORED)
        if self.block_sum is not None:
            _check("block_sum", self.block_sum, STORED)
            if self.divide != "reciprocal":
                raise ValueError("block_sum is defined for divide 'reciprocal', as ggml's Q8_1 has it")
        if self.integer_dot and (tuple(self.block) != (1, -1) or self.offset is not None):
            raise ValueError("integer_dot needs one scale a row, block (1, -1), and no offset")
        if len(self.block) != 2 or any(type(n) is not int or n == 0 or n < -1 for n in self.block):
            raise ValueError(f"block is {self.block!r}; it must be two integers, each positive or -1 (the whole axis)")
        if self.range in OFFSET_RANGES and self.offset is None:
            raise ValueError(f"range {self.range!r} needs an offset: 'zero_point' or a stored dtype")
        if self.range not in OFFSET_RANGES and self.offset is not None:
            raise ValueError(f"range {self.range!r} is symmetric and takes no offset; use range 'minmax'")
        if self.range == "minmax_zero" and self.offset == "zero_point":
            raise ValueError("range 'minmax_zero' needs a floating offset; with a zero point 'minmax' includes 0")
        if self.range == "mlx" and (self.offset == "zero_point" or self.type.qmin != 0):
            raise ValueError("range 'mlx' needs an unsigned qtype and a floating offset")
        if self.range == "one_signed" and self.type.qmin != 0:
            raise ValueError(f"range 'one_signed' needs an unsigned qtype, not {self.qtype}")
        if self.range != "one_signed" and self.offset is None and self.type.qmin == 0:
            raise ValueError(f"{self.qtype} has no negative codes: a symmetric grid needs a signed qtype")
        if self.divide.startswith("reciprocal") and self.range != "absmax":
            raise ValueError(f"divide {self.divide!r} is defined for range 'absmax', not {self.range!r}")

    def _check_nested(self, what: str, spec: "QuantSpec") -> None:
        if spec.range not in ("one_signed", "signed_max") or spec.divide != "stored" or not isinstance(spec.scale, str):
            raise ValueError(
                f"a quantized {what} needs range 'one_signed' or 'signed_max', divide 'stored' and a stored dtype"
            )
        ranges = ("absmax", "absmax_half", "signed_max", "minmax_zero")
        if self.range not in ranges or self.divide != "stored":
            raise ValueError(f"a quantized {what} goes with range {', '.join(ranges)} and divide 'stored' only")
        if self.range == "signed_max" and spec.range != "signed_max":
            raise ValueError(f"range 'signed_max' gives scales of both signs: a quantized {what} needs it too")

    @property
    def type(self) -> QType:
        return QTYPES[self.qtype]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "block": list(self.block)}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "QuantSpec":
        fields = dict(d)
        for key in ("scale", "offset"):
            if isinstance(fields.get(key), dict):
                fields[key] = cls.from_dict(fields[key])
        return cls(**fields)

    def label(self) -> str:
        """Short text for tables: `int4 (1, 32) absmax portable`."""
        parts = [self.qtype, f"({self.block[0]}, {self.block[1]})", self.range, _short(self.scale)]
        return " ".join(parts + ([f"+{_short(self.offset)}"] if self.offset else []))


def _short(stored: str | QuantSpec) -> str:
    return stored if isinstance(stored, str) else f"{stored.qtype}/{stored.block[1]}*{_short(stored.scale)}"


def stored_dtype(stored: str | QuantSpec) -> torch.dtype:
    """The dtype that holds a scale or floating offset: float32 if it is quantized itself, exact for 16-bit products."""
    return STORED[stored] if isinstance(stored, str) else torch.float32


def check_block(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """The block with -1 resolved against `shape` (R, C). Raises ValueError if it does not divide the shape."""
    r, c = (shape[i] if block[i] == -1 else block[i] for i in (0, 1))
    if not r or not c or shape[0] % r or shape[1] % c:
        raise ValueError(f"shape {tuple(shape)} is not divisible by block {tuple(block)}")
    return r, c


def matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in) of a float parameter of this layer kind and shape."""
    if kind == "Conv1D":
        return shape[1], shape[0]
    return shape[0], int(torch.Size(shape[1:]).numel())


def bits_per_weight(spec: QuantSpec, shape: tuple[int, int]) -> float:
    """Stored bits for each element of a (R, C) tensor: codes, scales and offsets."""
    r, c = check_block(shape, spec.block)
    grid = shape[0] // r, shape[1] // c
    extra = _stored_bits(spec.scale, grid)
    if spec.offset == "zero_point":
        extra += spec.type.bits
    elif spec.offset is not None:
        extra += _stored_bits(spec.offset, grid)
    return spec.type.bits + extra / (r * c)


def _stored_bits(stored: str | QuantSpec, grid: tuple[int, int]) -> float:
    return STORED[stored].itemsize * 8 if isinstance(stored, str) else bits_per_weight(stored, grid)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one layer is quantized. `input=None` leaves activations in floating point.

    static: the input's range is observed during calibration and then fixed; otherwise it is taken from each batch.
    """

    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    static: bool = False

    def __post_init__(self) -> None:
        if self.static and (self.input is None or self.input.block != (-1, -1)):
            raise ValueError("static: true needs an input spec with block (-1, -1): one range for the whole tensor")
        if self.static and self.input is not None and not self.input.divide.startswith("stored"):
            allowed = "'stored' or 'stored_inverse'"
            raise ValueError(f"a static input divides by its stored scale: {allowed}, not {self.input.divide!r}")
        by_row = self.weight is not None and self.weight.block == (1, -1) and self.weight.offset is None
        if self.input is not None and self.input.integer_dot and not by_row:
            raise ValueError("integer_dot needs weights with one scale a row, block (1, -1), and no offset")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which layers get a scheme. `path` and `type` are regular expressions that must match the whole module path
    and the whole class name; the first rule that matches a layer decides. `scheme=None` leaves it in floating point.

    share: layers of one parent matched by this rule share one static input range ("input"), as a runtime with fused
    q/k/v or gate/up projections needs.
    """

    path: str = ".*"
    type: str = ".*"
    scheme: Scheme | None = field(default=None)
    share: str | None = None

    def __post_init__(self) -> None:
        if self.share not in (None, "input"):
            raise ValueError(f"share is {self.share!r}; it must be 'input' or absent")


KvCache = Literal["float16", "float16_flash", "int8"]  # llama.cpp's; see qat.modules.attention
KV_CACHES: tuple[str, ...] = get_args(KvCache)
Gelu = Literal["float16_table"]  # llama.cpp's on a CPU; see qat.modules.gelu
GELUS: tuple[str, ...] = get_args(Gelu)
Kernels = Literal["ggml", "onnxruntime"]  # whose compute norms and activations; see qat.modules.norm and .activation
KERNELS: tuple[str, ...] = get_args(Kernels)


class Numerics(TypedDict):
    """`scheme=` of a recipe: which layers get which grid, and what else of the runtime training simulates."""

    rules: list[Rule]
    gelu: NotRequired[Gelu | None]
    kv_cache: NotRequired[KvCache | None]
    kernels: NotRequired[Kernels | None]
