"""The layers of a sequential network again, from the `config` that describes it: what packed weights are put into."""

from typing import Any

from torch import nn

from qat.frozen import Frozen

PLAIN = {"ReLU": nn.ReLU, "MaxPool2d": nn.MaxPool2d, "Flatten": nn.Flatten}


def build(frozen: Frozen) -> nn.Sequential:
    """The float network of a frozen one whose config is that of `qat.models.sequential.describe`, weights not set."""
    shapes = {n: tuple(t.shape) for n, t in frozen.floats.items()} | {n: w.shape for n, w in frozen.weights.items()}
    model = nn.Sequential()
    for layer in frozen.config["layers"]:
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in layer.items() if k not in ("name", "kind")}
        *parents, leaf = layer["name"].split(".")
        inside = model
        for parent in parents:
            if parent not in inside._modules:
                inside.add_module(parent, nn.Sequential())
            inside = inside.get_submodule(parent)
        inside.add_module(leaf, _layer(layer["kind"], shapes, layer["name"], settings))
    return model


def _layer(kind: str, shapes: dict[str, tuple[int, ...]], name: str, settings: dict[str, Any]) -> nn.Module:
    if kind in PLAIN:
        return PLAIN[kind](**settings)
    shape, bias = shapes[f"{name}.weight"], f"{name}.bias" in shapes
    if kind == "Linear":
        return nn.Linear(shape[1], shape[0], bias=bias)
    return nn.Conv2d(shape[1] * settings["groups"], shape[0], **settings, bias=bias)
