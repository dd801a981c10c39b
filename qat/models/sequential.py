"""A sequential network as plain data: the `config` from which an exporter builds the graph without the model."""

from typing import Any

from torch import nn

from qat.errors import UserError

Layer = dict[str, Any]


def describe(model: nn.Sequential, input_shape: tuple[int, ...], architecture: str = "sequential") -> dict[str, Any]:
    """{"architecture", "input_shape" (without the batch), "layers": [{"name", "kind", settings...}]} for `convert`.

    Layers: Conv2d, Linear, ReLU, MaxPool2d, Flatten, nested Sequentials; Identity and Dropout are left out. A
    fake-quantized layer is described as its float kind. Raises UserError naming any other layer or setting.
    """
    return {"architecture": architecture, "input_shape": list(input_shape), "layers": _layers(model, "")}


def _layers(model: nn.Sequential, prefix: str) -> list[Layer]:
    out: list[Layer] = []
    for name, module in model.named_children():
        path = f"{prefix}{name}"
        kind = next((k for k in KINDS if isinstance(module, k)), None)
        if kind is None:
            raise UserError(
                f"{path} is a {type(module).__name__}, which has no place in an exported graph; use "
                f"{', '.join(k.__name__ for k in KINDS)} (fold BatchNorm first: qat.fold.fold_batchnorm)"
            )
        if kind is nn.Sequential:
            out += _layers(module, f"{path}.")  # type: ignore[arg-type]
        elif kind not in (nn.Identity, nn.Dropout):
            out.append({"name": path, "kind": kind.__name__, **KINDS[kind](module, path)})
    return out


def _none(m: nn.Module, path: str) -> Layer:
    return {}


def _conv(m: Any, path: str) -> Layer:
    if m.padding_mode != "zeros" or isinstance(m.padding, str):
        raise UserError(f"{path} pads with {m.padding_mode!r}, {m.padding!r}; give zeros and a number of pixels")
    return {k: list(getattr(m, k)) for k in ("kernel_size", "stride", "padding", "dilation")} | {"groups": m.groups}


def _pool(m: Any, path: str) -> Layer:
    if m.return_indices:
        raise UserError(f"{path} returns indices; an exported MaxPool2d does not")
    sizes = {k: getattr(m, k) for k in ("kernel_size", "stride", "padding", "dilation")}
    return {k: [v, v] if isinstance(v, int) else list(v) for k, v in sizes.items()} | {"ceil_mode": m.ceil_mode}


def _flatten(m: Any, path: str) -> Layer:
    if (m.start_dim, m.end_dim) != (1, -1):
        raise UserError(f"{path} flattens dimensions {m.start_dim}..{m.end_dim}; only Flatten(1, -1) is exported")
    return {}


KINDS = {
    nn.Conv2d: _conv,
    nn.Linear: _none,
    nn.ReLU: _none,
    nn.MaxPool2d: _pool,
    nn.Flatten: _flatten,
    nn.Identity: _none,
    nn.Dropout: _none,
    nn.Sequential: _none,
}
