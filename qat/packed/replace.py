"""Put packed layers into a model, as a `quantization_config` (see exporters/hf_layout.py) describes them."""

from importlib import import_module
from typing import Any

from torch import nn

from qat.errors import UserError
from qat.packed import LAYERS
from qat.packed.base import PackedLayer
from qat.scheme import QuantSpec


def replace_layers(model: nn.Module, described: dict[str, Any]) -> None:
    """Replace, in place, every layer that is described; their words and scales stay empty until they are loaded.

    Raises UserError for a layer of the wrong kind or shape. A layer that `model` does not have is passed over: a base
    model may be loaded from the file of one with a head.
    """
    specs = [QuantSpec.from_dict(s) for s in described["specs"]]
    weights = {name.removesuffix(".weight"): entry for name, entry in described["weights"].items()}
    aliases = {a.removesuffix(".weight"): n.removesuffix(".weight") for a, n in described["ties"].items()}
    weights |= {alias: weights[name] for alias, name in aliases.items() if name in weights}
    for path in weights.keys() | described["inputs"].keys():
        found = find(model, path)
        if found is None:
            continue
        layer = model.get_submodule(found)
        entry, taken = weights.get(path), described["inputs"].get(path)
        packed = packed_class(layer, path).from_float(
            layer,
            None if entry is None else specs[entry["spec"]],
            None if taken is None else specs[taken["spec"]],
            bool(taken and taken["static"]),
        )
        if entry is not None and packed.rows * packed.cols != _numel(entry["shape"]):
            raise UserError(f"{path} has shape {packed.shape} in the model but {tuple(entry['shape'])} in the file")
        if path in aliases and entry is not None:  # its scales are the holder's: not in the file, so not in the state
            for name in ("weight_scale", "weight_offset"):
                packed._non_persistent_buffers_set.add(name)
        parent, _, leaf = found.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)


def tie_layers(model: nn.Module, described: dict[str, Any]) -> None:
    """Let every alias of `described["ties"]` use the words and scales of its holder."""
    for alias, name in described["ties"].items():
        a, b = (find(model, n.removesuffix(".weight")) for n in (alias, name))
        if a is None or b is None:
            continue
        one, other = model.get_submodule(a), model.get_submodule(b)
        if isinstance(one, PackedLayer) and isinstance(other, PackedLayer):
            one.tie(other)


def find(model: nn.Module, path: str) -> str | None:
    """The path of a layer in `model`, which may be the base model alone, or the base model and a head."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            model.get_submodule(name)
        except AttributeError:
            continue
        return name
    return None


def packed_class(layer: nn.Module, path: str) -> type[PackedLayer]:
    """The packed layer that stands in for `layer`. Raises UserError if there is none."""
    name = type(layer).__name__
    if name not in LAYERS:
        raise UserError(f"{path} is a {name} in this model; packed weights exist for {', '.join(LAYERS)}")
    file, _, cls = LAYERS[name].rpartition(".")
    return getattr(import_module(file), cls)


def _numel(shape: list[int]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out
