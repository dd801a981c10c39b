"""How one quantized weight lies in a Hugging Face folder, and how `quantization_config` describes all of them.

For a parameter NAME with codes (out, in): `NAME` int32 (out, ceil(in * bits / 32)), dense and low bits first, the code
minus qmin; `NAME_scale` (out / r, in / c) in its stored dtype; `NAME_offset` a floating offset like the scale, or zero
points minus qmin packed along `out`, int32 (ceil(out / r * bits / 32), in / c). That is compressed-tensors'
pack-quantized layout but for the names. The words sit under the float parameter's own name so that a reader which does
not know them fails on their shape: (out, ceil(in * bits / 32)) is no float weight's shape unless in = 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.affine import QTensor
from qat.filed import words
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.packing import pack, unpack
from qat.scheme import QuantSpec, check_block, matrix

Part = Callable[[], Tensor]  # makes one stored tensor
CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2 keeps these (in, out); others (out, in)


def _plain(x: Tensor) -> Tensor:
    """x with the strides of its shape: `contiguous` leaves those of a dimension of size 1 as they are."""
    return x if x.stride(-1) == 1 and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype that it was stored wider than, if that changes no value; else x, for `verify` to name.

    Raises ValueError for what is no floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"scales or offsets are {x.dtype}")
    out = x.to(dtype)
    return out if torch.equal(out.float(), x.float()) else x


def to_words(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Codes (R, C), any integer dtype -> int32 words (R, ceil(C * bits / 32))."""
    return pack(codes.to(spec.type.storage), spec.type.bits, spec.type.qmin)


def to_codes(words: Tensor, spec: QuantSpec, cols: int) -> Tensor:
    """Int32 words (R, W) -> codes (R, cols) in the spec's storage dtype."""
    unsigned = unpack(_plain(words), spec.type.bits, cols)
    return unsigned.view(torch.int8).add_(spec.type.qmin) if spec.type.qmin else unsigned  # int8 wraps too


def to_offset(stored: Tensor | None, spec: QuantSpec, rows: int) -> Tensor | None:
    """What `encode` stored as the offset -> the offset as affine.py takes it, (R / r, C / c)."""
    if stored is None or spec.offset != "zero_point":
        return stored
    return unpack(_plain(stored.t()), spec.type.bits, rows).t().to(torch.int32) + spec.type.qmin


def encode(name: str, q: QTensor) -> dict[str, Part]:
    """The tensors to store for one weight."""
    out: dict[str, Part] = {name: lambda: words(q), f"{name}_scale": q.scale.contiguous}
    if (offset := q.offset) is None:
        return out
    if q.spec.offset == "zero_point":
        return {**out, f"{name}_offset": lambda: to_words(offset.t(), q.spec).t().contiguous()}
    return {**out, f"{name}_offset": offset.contiguous}


def decode(name: str, tensors: dict[str, Tensor], entry: dict[str, Any], spec: QuantSpec) -> FrozenWeight:
    """The inverse of `encode`, taking what it uses out of `tensors`. Raises KeyError or ValueError if it cannot be."""
    shape = tuple(entry["shape"])
    rows, cols = matrix(entry["kind"], shape)
    r, _ = check_block((rows, cols), spec.block)
    offset = to_offset(tensors.pop(f"{name}_offset", None), spec, rows // r)
    codes = to_codes(tensors.pop(name), spec, cols)
    return FrozenWeight(QTensor(codes, tensors.pop(f"{name}_scale"), offset, spec), entry["kind"], shape)


def encode_input(module: str, i: FrozenInput) -> dict[str, Part]:
    """The static scale and offset of a layer's input, (1, 1) each; nothing for a dynamic one."""
    parts = {f"{module}.input_scale": i.scale, f"{module}.input_offset": i.offset}
    return {name: t.contiguous for name, t in parts.items() if t is not None}


def describe(frozen: Frozen) -> dict[str, Any]:
    """`quantization_config` of a folder whose quant_method is "qat": every spec once; weights name theirs by number."""
    used = [frozen.weights[n].tensor.spec for n in sorted(frozen.weights)]
    specs = list(dict.fromkeys([*used, *(frozen.inputs[n].spec for n in sorted(frozen.inputs))]))
    return {
        "quant_method": "qat",
        "format": "pack-quantized",
        "specs": [s.to_dict() for s in specs],
        "weights": {
            n: {"spec": specs.index(w.tensor.spec), "kind": w.kind, "shape": list(w.shape)}
            for n, w in frozen.weights.items()
        },
        "inputs": {n: {"spec": specs.index(i.spec), "static": i.static} for n, i in frozen.inputs.items()},
        "ties": frozen.ties,
    }
