"""The dialect of the Hugging Face folder that the compressed-tensors library reads: its names and its configuration.

vLLM and plain transformers load such a folder without our package. Every grid here is one that vLLM computes exactly
as it was trained; `caveats` says where transformers does not. All others are written with quant_method "qat".
"""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.exporters.hf_layout import Part, encode
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec

METHOD = "compressed-tensors"
# vLLM's dynamic tokens: scale max|x| / 127, codes rne(x * (127 / max|x|)), in float32 (its int8 quantization kernels)
TOKEN = QuantSpec(qtype="int8", block=(1, -1), divide="reciprocal", scale="float32")
# beside int4 weights its one kernel (torch's _dyn_quant_matmul_4bit) takes each token's range, with a zero point
RANGE = QuantSpec(qtype="int8", block=(1, -1), range="minmax", scale="float32", offset="zero_point")
TENSOR = QuantSpec(qtype="int8", block=(-1, -1))  # one static scale: rne(clamp(x / scale)); its stored dtype is free


def why_not(frozen: Frozen, dtype: torch.dtype) -> str | None:
    """Why vLLM could not compute this exactly from a folder of `dtype` floats; None if it can."""
    if not frozen.weights:
        return "no weight is quantized"
    for key in ("gelu", "kv_cache"):
        if value := frozen.config.get(key):
            return f"it was trained with {key}={value}"
    for name, w in frozen.weights.items():
        given = frozen.inputs.get(name.removesuffix(".weight"))
        reason = _weight(w, name in frozen.ties.values(), dtype) or (given and _input(given, w.tensor.spec, dtype))
        if reason:
            return f"{name} {reason}"
    if (
        any(w.tensor.spec.offset for w in frozen.weights.values())
        and len({_grid(frozen, n) for n in frozen.weights}) > 1
    ):
        return "some weights are asymmetric and grids differ: transformers dequantizes all on the first grid"
    alone = next((m for m in frozen.inputs if f"{m}.weight" not in frozen.weights), None)
    return f"{alone} has a quantized input and a float weight" if alone else None


def _weight(w: FrozenWeight, tied: bool, dtype: torch.dtype) -> str | None:
    spec = w.tensor.spec
    if w.kind != "Linear":
        return f"belongs to {w.kind}, not to Linear"
    if spec.type.qmin == 0 or spec.qtype == "ternary":
        return f"has {spec.qtype} codes; int{spec.type.bits} is what fits"
    if spec.offset not in (None, "zero_point"):
        return "has a floating offset; 'zero_point' is what fits"
    if spec.block[0] != 1:
        return "has blocks of several rows"
    if tied:
        return "is tied"
    return None if _holds(w.tensor.scale, dtype) else f"has scales that {dtype} cannot hold"


def _input(given: FrozenInput, weight: QuantSpec, dtype: torch.dtype) -> str | None:
    channel = weight.block == (1, -1)
    if weight.offset is not None:
        return "is asymmetric and its input is quantized"
    if given.static:
        if weight.type.bits != 8 or not channel:
            return "has a static input, which goes with int8 weights and one scale a channel"
        if replace(given.spec, scale="portable") != TENSOR:
            return f"has an input on grid {given.spec.label()}; {TENSOR.label()} is what fits"
        if given.scale is None:
            return "has a static input without a scale"
        return None if _holds(given.scale, dtype) else f"has an input scale that {dtype} cannot hold"
    if weight.type.bits not in (4, 8) or (weight.type.bits == 8 and not channel):
        return "has a dynamic input, which goes with int4 weights or int8 ones with one scale a channel"
    theirs = TOKEN if weight.type.bits == 8 else RANGE
    if given.spec != theirs:
        said = f"has an input on grid {given.spec.label()}, {given.spec.divide}"
        return f"{said}; {theirs.label()}, {theirs.divide} is vLLM's"
    return None


def _holds(scale: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(scale.to(dtype).float(), scale.float())


def caveats(frozen: Frozen) -> list[str]:
    """What transformers does with such a folder that vLLM does not."""
    out: list[str] = []
    if any(i.spec == TOKEN for i in frozen.inputs.values()):
        out.append(
            "transformers' compressed-tensors path takes max|x| / 127.5 as a token's scale; training followed vLLM's "
            "max|x| / 127, so figures from transformers are off by that"
        )
    if any(w.tensor.spec.offset for w in frozen.weights.values()):
        out.append(
            "transformers loads asymmetric weights only with quantization_config=CompressedTensorsConfig("
            "dequantize=True), then exactly"
        )
    return out


def for_vllm(found: dict[str, Any]) -> bool:
    """Whether a `quantization_config` rounds the inputs of all its layers on one grid: vLLM computes these in integers,
    transformers in floats, dynamic int8 on another formula. (vLLM fuses layers, whose grids must be the same.)"""
    groups = list((found.get("config_groups") or {}).values())
    return found.get("quant_method") == METHOD and len(groups) == 1 and bool(groups[0].get("input_activations"))


def tensors(name: str, w: FrozenWeight, given: FrozenInput | None, dtype: torch.dtype) -> dict[str, Part]:
    """The tensors to store for one weight and its layer's input, under the library's names.

    Layers with quantized inputs keep int8 codes (out, in) under the weight's own name ("int-quantized", at 4 bits
    too); the others int32 words ("pack-quantized"). A zero point lies along `out`, and its scale is in `dtype`: the
    library multiplies asymmetric codes in the dtype of the stored scale.
    """
    parts = encode(name, w.tensor)
    scale, zero = parts[f"{name}_scale"], parts.get(f"{name}_offset")
    if given is not None:
        out: dict[str, Part] = {name: lambda: w.tensor.codes.contiguous(), f"{name}_scale": scale}
        if (fixed := given.scale) is None:
            return out
        return {**out, f"{name.removesuffix('weight')}input_scale": lambda: fixed.reshape(1)}
    out = {f"{name}_packed": parts[name], f"{name}_scale": scale, f"{name}_shape": lambda: torch.tensor(w.shape)}
    return out if zero is None else {**out, f"{name}_scale": lambda: scale().to(dtype), f"{name}_zero_point": zero}


def describe(frozen: Frozen) -> dict[str, Any]:
    """`quantization_config`: one group if all layers share a grid, else a group for each with its layers by name."""
    by_grid: dict[tuple[int, int, bool, str], list[str]] = {}
    for name in sorted(frozen.weights):
        by_grid.setdefault(_grid(frozen, name), []).append(name.removesuffix(".weight"))
    formats = {"int-quantized" if taken else "pack-quantized" for *_, taken in by_grid}
    left = [n for n, t in frozen.floats.items() if t.ndim == 2] + list(frozen.ties)
    narrow = {w.tensor.spec.scale for w in frozen.weights.values() if w.tensor.spec.offset}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(by_grid) == 1 else modules,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group == -1 else "group",
                    "group_size": None if group == -1 else group,
                    "dynamic": False,
                },
                "input_activations": _activations(taken),
                "output_activations": None,
                "format": "int-quantized" if taken else "pack-quantized",
            }
            for i, ((bits, group, symmetric, taken), modules) in enumerate(by_grid.items())
        },
        "ignore": sorted(re.sub(r"\.weight$", "", n) for n in left if n.endswith(".weight")),
        "ties": frozen.ties,
        **({"asymmetric_scales": narrow.pop()} if len(narrow) == 1 else {}),  # stored wider than they need be
    }


def _grid(frozen: Frozen, name: str) -> tuple[int, int, bool, str]:
    """Of one weight: bits, group size or -1, whether it is symmetric, the strategy of its input ("range": of tokens
    with zero points) or ""."""
    spec, given = frozen.weights[name].tensor.spec, frozen.inputs.get(name.removesuffix(".weight"))
    taken = "" if given is None else "tensor" if given.static else "token" if given.spec == TOKEN else "range"
    return spec.type.bits, spec.block[1], spec.offset is None, taken


def _activations(taken: str) -> dict[str, Any] | None:
    if not taken:
        return None
    strategy = "tensor" if taken == "tensor" else "token"
    told = {"symmetric": taken != "range", "strategy": strategy, "dynamic": strategy == "token"}
    return {"num_bits": 8, "type": "int", **told}
