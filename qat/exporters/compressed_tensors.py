"""The dialect of the Hugging Face folder that the compressed-tensors library reads: its names and its configuration.

Plain transformers (and vLLM) load such a folder without our package. Their loader is exact for symmetric linear layers
with one scale a row or group; everything else is written with quant_method "qat" instead.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.exporters.hf_layout import encode
from qat.frozen import Frozen
from qat.scheme import QuantSpec

METHOD = "compressed-tensors"


def why_not(frozen: Frozen, dtype: torch.dtype) -> str | None:
    """Why the library's loader could not read this exactly as a model of `dtype`; None if it can."""
    if frozen.inputs:
        return "inputs are quantized"
    if not frozen.weights:
        return "no weight is quantized"
    for name, w in frozen.weights.items():
        spec = w.tensor.spec
        if w.kind != "Linear":
            return f"{name} belongs to {w.kind}, not to Linear"
        if spec.offset is not None or spec.type.qmin == 0:
            return f"{name} is asymmetric"
        if spec.block[0] != 1:
            return f"{name} has blocks of several rows"
        if name in frozen.ties.values():
            return f"{name} is tied"
        if not torch.equal(w.tensor.scale.to(dtype).float(), w.tensor.scale.float()):
            return f"{name} has scales that {dtype} cannot hold"
    return None


def tensors(name: str, frozen: Frozen) -> dict[str, Tensor]:
    """The tensors to store for one weight, under the library's names."""
    w = frozen.weights[name]
    parts = encode(name, w.tensor)
    shape = torch.tensor(w.shape)
    return {f"{name}_packed": parts[name], f"{name}_scale": parts[f"{name}_scale"], f"{name}_shape": shape}


def describe(frozen: Frozen) -> dict[str, Any]:
    """`quantization_config`: one group if all layers share a grid, else a group for each with its layers by name."""
    by_grid: dict[tuple[int, int], list[str]] = {}
    for name, w in frozen.weights.items():
        spec = w.tensor.spec
        group = -1 if w.tensor.scale.shape[1] == 1 else spec.block[1]
        by_grid.setdefault((spec.type.bits, group), []).append(name.removesuffix(".weight"))
    left = [n for n, t in frozen.floats.items() if t.ndim == 2] + list(frozen.ties)
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(by_grid) == 1 else modules,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if group == -1 else "group",
                    "group_size": None if group == -1 else group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for i, ((bits, group), modules) in enumerate(by_grid.items())
        },
        "ignore": sorted(n.removesuffix(".weight") for n in left if n.endswith(".weight")),
        "ties": frozen.ties,
    }


def translate(config: dict[str, Any], shapes: dict[str, list[int]], scales: dict[str, torch.dtype]) -> dict[str, Any]:
    """The library's configuration -> one as `hf_layout.describe` writes it.

    shapes: the float shape of every weight that is stored packed; scales: the dtype of its scales. Range and rounding
    are not in the file, so the specs have a default there. Raises UserError for what is not integers packed in words.
    """
    if config.get("format") not in ("pack-quantized", "mixed-precision") or config.get("kv_cache_scheme"):
        raise UserError(
            f"compressed-tensors format {config.get('format')!r} (or a quantized cache) is not supported here; only "
            "pack-quantized weights are. Load it with transformers instead"
        )
    specs: list[QuantSpec] = []
    weights: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        spec = _spec(_group(config, name.removesuffix(".weight")), name, scales[name])
        if spec not in specs:
            specs.append(spec)
        weights[name] = {"spec": specs.index(spec), "kind": "Linear", "shape": shape}
    return {
        "quant_method": "qat",
        "format": "pack-quantized",
        "specs": [s.to_dict() for s in specs],
        "weights": weights,
        "inputs": {},
        "ties": config.get("ties", {}),
    }


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
    raise UserError(f"{module} is stored packed, but no config group of quantization_config targets it")


def _spec(group: dict[str, Any], name: str, scale: torch.dtype) -> QuantSpec:
    w = group["weights"]
    if group.get("input_activations") or w["type"] != "int" or w["strategy"] not in ("group", "channel", "tensor"):
        raise UserError(f"{name}: only integer weights by group, channel or tensor and float inputs can be read")
    block = {"group": (1, w["group_size"]), "channel": (1, -1), "tensor": (-1, -1)}[w["strategy"]]
    asymmetric = {} if w["symmetric"] else {"range": "minmax", "offset": "zero_point"}
    return QuantSpec(qtype=f"int{w['num_bits']}", block=block, scale=str(scale).removeprefix("torch."), **asymmetric)
