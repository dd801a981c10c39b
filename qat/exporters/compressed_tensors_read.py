"""Folders in compressed-tensors' dialect, ours and other writers', read as the "qat" dialect of hf_layout.py."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.exporters.compressed_tensors import TENSOR, TOKEN
from qat.exporters.hf_layout import narrow, to_words
from qat.scheme import STORED, QuantSpec

FORMATS = ("pack-quantized", "int-quantized", "mixed-precision")


def our_name(name: str) -> str | None:
    """A tensor's name in the "qat" dialect; None for what only compressed-tensors needs."""
    if name.endswith(".weight_shape"):
        return None
    return name.removesuffix("_packed") if name.endswith(".weight_packed") else name.replace("_zero_point", "_offset")


def ours(name: str, tensor: Tensor, described: dict[str, Any]) -> Tensor:
    """A tensor under `our_name` as the "qat" dialect stores it: int8 codes become words, a scale (1,) becomes (1, 1),
    and a scale that was widened for the file gets its stored dtype back."""
    entry = described["weights"].get(name)
    if entry is not None and tensor.dtype == torch.int8:
        return to_words(tensor, QuantSpec.from_dict(described["specs"][entry["spec"]]))
    if name.endswith(".input_scale"):
        return tensor.reshape(1, 1)
    scaled = described["weights"].get(name.removesuffix("_scale")) if name.endswith("_scale") else None
    if scaled is not None:
        stored = described["specs"][scaled["spec"]]["scale"]
        return narrow(tensor, STORED[stored]) if isinstance(stored, str) else tensor
    return tensor


def translate(config: dict[str, Any], shapes: dict[str, list[int]], scales: dict[str, torch.dtype]) -> dict[str, Any]:
    """The library's configuration -> one as `hf_layout.describe` writes it.

    shapes: the float shape of every quantized weight; scales: the dtypes of all stored scales. Range and rounding
    are not in the file, so the weights' specs have a default there. Raises UserError for what is not integers.
    """
    if config.get("format") not in FORMATS or config.get("kv_cache_scheme"):
        raise UserError(
            f"compressed-tensors format {config.get('format')!r} (or a quantized cache) is not supported here; only "
            "pack-quantized and int-quantized are. Load it with transformers instead"
        )
    specs: list[QuantSpec] = []
    weights: dict[str, dict[str, Any]] = {}
    inputs: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        group = _group(config, module)
        stored = str(scales[name]).removeprefix("torch.")
        if not group["weights"]["symmetric"]:
            stored = config.get("asymmetric_scales", stored)
        spec = _weight_spec(group["weights"], name, stored)
        weights[name] = {"spec": _index(specs, spec), "kind": "Linear", "shape": shape}
        if group.get("input_activations"):
            taken = _input_spec(group["input_activations"], module, scales.get(f"{module}.input"))
            inputs[module] = {"spec": _index(specs, taken), "static": taken.block == TENSOR.block}
    return {
        "quant_method": "qat",
        "format": "pack-quantized",
        "specs": [s.to_dict() for s in specs],
        "weights": weights,
        "inputs": inputs,
        "ties": config.get("ties", {}),
    }


def _index(specs: list[QuantSpec], spec: QuantSpec) -> int:
    if spec not in specs:
        specs.append(spec)
    return specs.index(spec)


def _group(config: dict[str, Any], module: str) -> dict[str, Any]:
    """The group of a layer: by name, by regular expression, by class, in that order, as the library looks."""

    def named(targets: Iterable[str]) -> bool:
        return module in targets

    def matched(targets: Iterable[str]) -> bool:
        return any(t.startswith("re:") and re.match(t[3:], module) for t in targets)

    def classed(targets: Iterable[str]) -> bool:
        return "Linear" in targets

    groups = list(config["config_groups"].values())
    for rule in (named, matched, classed):
        for group in groups:
            if rule(group["targets"]):
                return group
    raise UserError(f"{module} is stored quantized, but no config group of quantization_config targets it")


def _weight_spec(w: dict[str, Any], name: str, scale: str) -> QuantSpec:
    if w["type"] != "int" or w["strategy"] not in ("group", "channel", "tensor"):
        raise UserError(f"{name}: only integer weights by group, channel or tensor can be read")
    block = {"group": (1, w["group_size"]), "channel": (1, -1), "tensor": (-1, -1)}[w["strategy"]]
    asymmetric: dict[str, Any] = {} if w["symmetric"] else {"range": "minmax", "offset": "zero_point"}
    return QuantSpec(qtype=f"int{w['num_bits']}", block=block, scale=scale, **asymmetric)


def _input_spec(a: dict[str, Any], module: str, scale: torch.dtype | None) -> QuantSpec:
    if a["type"] == "int" and a["num_bits"] == 8 and a["symmetric"]:
        if a["strategy"] == "token" and a["dynamic"]:
            return TOKEN
        if a["strategy"] == "tensor" and not a["dynamic"] and scale is not None:
            return replace(TENSOR, scale=str(scale).removeprefix("torch."))
    raise UserError(f"{module}: only symmetric int8 inputs, dynamic by token or static by tensor, can be read")
