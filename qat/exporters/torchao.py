"""A Hugging Face folder that transformers loads through torchao (TorchAoConfig), written by hand from frozen codes.

Stored: `MODULE._weight_qdata` int8 (out, in), one a code whatever its bits, `_weight_scale`, `_weight_zero_point`, and
in the header of every weight file one JSON text a parameter, from which torchao rebuilds its tensor subclasses.
Layout: torchao.prototype.safetensors, as of torchao 0.18.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.affine import QTensor
from qat.errors import UserError, VerifyError, understood
from qat.exporters.hf_folder import (
    base_config,
    described,
    float_dtype,
    floats_of,
    frozen_weight,
    inputs_of,
    opened,
    parts_of,
    read_config,
    read_tensors,
    refuse_model,
    said_of,
    tokenizer_files,
    weight_files,
    write,
)
from qat.exporters.hf_layout import Part
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec, Scheme

RUNTIME = "transformers_folder"
APPENDS = True
METHOD = "torchao"
METADATA = "safetensors"  # key of `header`
INTX, INT8 = "IntxUnpackedToInt8Tensor", "Int8Tensor"
PARTS = ["qdata", "scale", "zero_point"]
# torchao's inputs, a grid for each token: Int8DynamicActivationIntx (8da4w) and Int8DynamicActivationInt8
ASYMMETRIC = QuantSpec(qtype="int8", range="minmax", divide="stored_inverse", scale="float32", offset="zero_point")
SYMMETRIC = replace(ASYMMETRIC, range="absmax_half", offset=None, integer_dot=True)


def missing_runtime() -> str | None:
    """What to install where torchao is not there; None if it is."""
    return None if find_spec("torchao") else "pip install torchao"


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why torchao cannot hold this parameter, and what to do; None if it can."""
    if reason := refuse_model(config):
        return reason
    if spec is None:
        return None
    if kind != "Linear":
        return f"transformers quantizes Linear layers alone with torchao, not {kind}; leave it out of the rules"
    if spec.block[0] != 1:
        return f"blocks of several rows do not fit; (1, {spec.block[1]}) is the nearest that does"
    if spec.qtype == "ternary" or spec.offset not in (None, "zero_point"):
        return f"grid {spec.label()} does not fit; int{spec.type.bits}, symmetric or with a zero point, is the nearest"
    return None


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why torchao would compute a layer's input otherwise than its scheme says; None if it would not."""
    weight, spec = scheme.weight, scheme.input
    if spec is None:
        return None
    if weight is None:
        return "its input is quantized but its weight is not, which torchao cannot express"
    if not scheme.static and spec == (SYMMETRIC if _is_int8(weight) else ASYMMETRIC):
        return None
    fits = "torchao_int8_dynamic" if _is_int8(weight) else "8da4w"
    static = ", static," if scheme.static else ""
    return f"inputs on {spec.label()}{static} are not what torchao computes; scheme={fits} has that"


def _is_int8(spec: QuantSpec) -> bool:
    """Whether this is Int8Tensor's grid: int8 with one scale a channel."""
    return (spec.qtype, spec.block, spec.offset) == ("int8", (1, -1), None)


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for an input grid that torchao does not have."""
    for module, scheme in frozen.schemes().items():
        if why := refuse_scheme(scheme, frozen.config):
            raise UserError(f"{module}: {why}")
    dtype = float_dtype(frozen)
    for name, w in frozen.weights.items():
        scale = w.tensor.scale
        if not torch.equal(scale.to(_scales(w, dtype)).float(), scale.float()):
            raise UserError(f"{name} has scales that {dtype} cannot hold: use scale 'portable'")
    made = header(frozen)
    metadata = {name: json.dumps(value) for name, value in made.pop(METADATA).items()}
    write(path, made, frozen, _tensors, metadata)


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json and, under METADATA, the weight files' headers."""
    dtype = float_dtype(frozen)
    metadata: dict[str, Any] = {n: {"_type": "Tensor"} for n in frozen.floats}
    for name, w in frozen.weights.items():
        metadata[name] = _metadata(w, frozen.inputs.get(name.removesuffix(".weight")), dtype)
    metadata["tensor_names"] = sorted(metadata)
    return base_config(frozen) | described(frozen) | _config(frozen) | {METADATA: metadata}


def read_header(path: Path) -> dict[str, Any]:
    """What `header` made, of a folder. Raises VerifyError if it cannot be read."""
    metadata: dict[str, Any] = {}
    for file in weight_files(path):
        with understood(file), opened(file) as f:
            metadata |= {k: json.loads(v) for k, v in f.metadata().items() if k != "format"}
    return read_config(path) | {METADATA: metadata}


def caveats(frozen: Frozen) -> list[str]:
    """What its reader does differently from training."""
    if frozen.inputs and float_dtype(frozen) != torch.float32:
        return [f"torchao quantizes activations in the model's {float_dtype(frozen)}, training in float32"]
    return []


def _scales(w: FrozenWeight, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a weight's scales are stored in a model of `dtype`."""
    return torch.float32 if _is_int8(w.tensor.spec) else dtype


def _tensors(frozen: Frozen) -> Iterator[tuple[str, Part]]:
    """What makes every tensor of the folder."""
    yield from floats_of(frozen)
    dtype = float_dtype(frozen)

    def parts(name: str, w: FrozenWeight) -> dict[str, Part]:
        made = _codes(w.tensor), lambda: w.tensor.scale.to(_scales(w, dtype)), _zeros(w.tensor)
        return {f"{name.removesuffix('weight')}_weight_{k}": make for k, make in zip(PARTS, made, strict=True)}

    yield from parts_of(frozen, parts)


def _shift(q: QTensor) -> int:
    """From our codes to torchao's, which are signed."""
    return -(2 ** (q.spec.type.bits - 1)) - q.spec.type.qmin


def _codes(q: QTensor) -> Part:
    if not (shift := _shift(q)):
        return lambda: q.codes.contiguous()
    return lambda: (q.codes.contiguous().view(torch.uint8) + shift % 256).view(torch.int8)  # uint8 wraps, as it should


def _zeros(q: QTensor) -> Part:
    if (offset := q.offset) is None:
        return lambda: torch.zeros_like(q.scale, dtype=torch.int8)
    return lambda: (offset + _shift(q)).to(torch.int8)


def _type(dtype: torch.dtype | str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}


def _metadata(w: FrozenWeight, given: FrozenInput | None, dtype: torch.dtype) -> dict[str, Any]:
    spec = w.tensor.spec
    data: dict[str, Any] = {"block_size": [1, w.shape[1] // w.tensor.scale.shape[1]], "dtype": _type(dtype)}
    if _is_int8(spec):
        taken = None if given is None else {"_type": "QuantizeTensorToInt8Kwargs", "_data": _SYMMETRIC_TOKENS}
        data |= {"act_quant_kwargs": taken, "reduce_range": False}
    else:
        taken = None if given is None else "int8_asym_per_token"
        data |= {"activation_quantization": taken, "target_dtype": _type(f"int{spec.type.bits}")}
    return {
        "_type": INT8 if _is_int8(spec) else INTX,
        "_data": data,
        "_tensor_data_names": PARTS,
    }


_SYMMETRIC_TOKENS = {
    "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
    "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
    "reduce_range": False,
}


def _config(frozen: Frozen) -> dict[str, Any]:
    """`quantization_config`, for readers that look at it; the weights load by their metadata."""
    kinds = {n: _recipe(w.tensor.spec, n.removesuffix(".weight") in frozen.inputs) for n, w in frozen.weights.items()}
    different = {json.dumps(k, sort_keys=True): k for k in kinds.values()}
    if len(different) == 1:
        chosen = next(iter(different.values()))
    else:
        by_name = {n.removesuffix(".weight"): k for n, k in kinds.items()}
        chosen = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": by_name}}
    left = [n for n, t in frozen.floats.items() if t.ndim == 2] + list(frozen.ties)
    config = {
        "quant_method": METHOD,
        "quant_type": {"default": chosen},
        "modules_to_not_convert": sorted(n.removesuffix(".weight") for n in left if n.endswith(".weight")),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    return {"quantization_config": config}


def _recipe(spec: QuantSpec, dynamic: bool) -> dict[str, Any]:
    """torchao's own configuration that makes such a weight."""

    def item(kind: str, value: Any, version: int | None = None) -> dict[str, Any]:
        return {"_type": kind, "_data": value} | ({"_version": version} if version else {})

    if _is_int8(spec):
        row = {"granularity": item("PerRow", {"dim": -1}, 1)}
        name = "Int8DynamicActivationInt8WeightConfig" if dynamic else "Int8WeightOnlyConfig"
        return item(name, row, 2)
    whole = spec.block[1] == -1
    size = item("PerAxis", {"axis": 0}, 1) if whole else item("PerGroup", {"group_size": spec.block[1]}, 1)
    mapping = item("MappingType", "SYMMETRIC" if spec.offset is None else "ASYMMETRIC")
    before = "weight_" if dynamic else ""
    data = {"weight_dtype": _type(f"int{spec.type.bits}"), f"{before}granularity": size}
    data[f"{before}mapping_type"] = mapping
    return item("Int8DynamicActivationIntxWeightConfig" if dynamic else "IntxWeightOnlyConfig", data, 2)


def read(path: Path) -> Frozen:
    """The folder back, other writers' included. Raises UserError if it is not torchao's, and anything (see reading.py)
    if it is damaged."""
    path = Path(path)
    config = read_config(path)
    found = config.pop("quantization_config", None) or {}
    if found.get("quant_method") != METHOD:
        raise UserError(f"{path}: its quant_method is {found.get('quant_method')!r}, not {METHOD!r}")
    about = config.pop("qat", None)
    tensors, metadata = read_tensors(path)
    weights: dict[str, FrozenWeight] = {}
    inputs: dict[str, FrozenInput] = {}
    for name in json.loads(metadata["tensor_names"]):
        with understood(f"{path}: {name}"):
            meta = json.loads(metadata[name])
            if meta["_type"] == "Tensor":
                continue
            weights[name] = _weight(name, meta, tensors, said_of(name, about))
            data = meta["_data"]
            if data.get("activation_quantization") or data.get("act_quant_kwargs"):
                spec = SYMMETRIC if meta["_type"] == INT8 else ASYMMETRIC
                inputs[name.removesuffix(".weight")] = FrozenInput(spec, static=False)
    if about is not None and inputs_of(about) != inputs:
        raise VerifyError(f"{path}: its header and its config disagree on which inputs are quantized")
    return Frozen(weights, tensors, inputs, (about or {}).get("ties", {}), config, tokenizer_files(path))


def _weight(name: str, meta: dict[str, Any], tensors: dict[str, Tensor], said: QuantSpec | None) -> FrozenWeight:
    """One weight, taken out of `tensors`. Raises KeyError or ValueError for what is not Intx or Int8."""
    if meta["_type"] not in (INTX, INT8):
        raise ValueError(f"{name} is a {meta['_type']}; {INTX} and {INT8} can be read")
    if sorted(meta["_tensor_data_names"]) != sorted(PARTS):
        raise ValueError(f"{name} has parts {meta['_tensor_data_names']}, not {PARTS}")
    data = meta["_data"]
    codes, scale, zero = (tensors.pop(f"{name.removesuffix('weight')}_weight_{part}") for part in PARTS)
    bits = 8 if meta["_type"] == INT8 else int(data["target_dtype"]["_data"].removeprefix("int"))
    block = (1, -1) if data["block_size"][1] == codes.shape[1] else (1, data["block_size"][1])
    asymmetric = bool(zero.any()) or (said is not None and said.offset is not None)
    said = None if said and asymmetric and said.offset is None else said  # the tensor is what torchao computes with
    kind: dict[str, Any] = {"range": "minmax", "offset": "zero_point"} if asymmetric else {}
    spec = QuantSpec(qtype=f"int{bits}", block=block, scale=str(scale.dtype).removeprefix("torch."), **kind)
    half = 2 ** (bits - 1)
    return frozen_weight(codes.int() + half, scale, zero.int() + half if asymmetric else None, spec, said)
