"""prepare: a float model becomes one that trains with fake-quantized layers. convert: its codes are decided, once."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.auditing import audit
from qat.errors import UserError
from qat.frozen import Frozen, FrozenInput, FrozenWeight, blank, write_frozen
from qat.modules import quantized_class
from qat.modules.base import QuantLayer
from qat.modules.numerics import refuse_numerics, use_numerics
from qat.observers.base import Observer
from qat.observers.minmax import MinMaxObserver
from qat.quantizers.base import FakeQuantize
from qat.quantizers.minmax import MinMax
from qat.quantizers.observed import Observed
from qat.scheme import QuantSpec, Rule, Scheme
from qat.streams import ahead

WeightQuantizer = Callable[[QuantSpec, Tensor], FakeQuantize]


def prepare(
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    weight: WeightQuantizer = MinMax,
    observer: Callable[[], Observer] = MinMaxObserver,
    gelu: str | None = None,
    kv_cache: str | None = None,
    kernels: str | None = None,
) -> nn.Module:
    """Replace, in place, every layer that a rule gives a scheme; returns the model.

    Call it before the optimiser is made and before a checkpoint is loaded: learned scales are parameters. Weights
    keep their names and their identity. weight(spec, tensor (out, in)) makes the weight quantizers; observer() the
    ranges of static inputs. gelu="float16_table" replaces GELU by llama.cpp's (`qat.modules.gelu`); kv_cache, one of
    KV_CACHES, computes attention as over its cache (`qat.modules.attention`); kernels, one of KERNELS, evaluates
    norms and activations as that runtime's do (`qat.modules.norm`, `.activation`). All are noted in the model's config.
    Raises UserError as `audit` does, or if the model is prepared already; the model is then as it was.
    """
    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise UserError("this model is prepared already; prepare a float model, once")
    rows = audit(model, rules).rows
    refuse_numerics(model, gelu, kv_cache, kernels)
    replaced: list[tuple[str, str, nn.Module]] = []  # all at the end: a refused model stays as it was
    shared: dict[int, FakeQuantize] = {}  # one quantizer for each tied tensor
    inputs: dict[tuple[str, int], FakeQuantize] = {}
    for row in rows:
        if row.rule is None or not row.name.endswith("weight") or (row.spec is None and not rules[row.rule].scheme):
            continue
        rule = rules[row.rule]
        scheme = rule.scheme or Scheme()
        parent, _, leaf = row.module.rpartition(".")
        layer = model.get_submodule(row.module)
        cls = quantized_class(layer)
        quantizer = None
        if row.spec is not None:
            tensor: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
            if id(tensor) not in shared:
                shared[id(tensor)] = _weight(weight, row.name, row.spec, cls.canonical(tensor.detach()))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            quantizer = shared[id(tensor)]
        taken = None
        if scheme.input is not None and row.kind != "Embedding":
            key = (parent, row.rule) if rule.share == "input" else (row.module, row.rule)
            if key not in inputs:
                inputs[key] = Observed(scheme.input, observer) if scheme.static else MinMax(scheme.input)
            taken = inputs[key]
        device = next(layer.parameters()).device
        new = cls.from_float(layer, quantizer, taken).to(device)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        replaced.append((parent, leaf, new))
    for parent, leaf, new in replaced:
        setattr(model.get_submodule(parent), leaf, new)
    use_numerics(model, gelu, kv_cache, kernels)
    return model


def _weight(factory: WeightQuantizer, name: str, spec: QuantSpec, tensor: Tensor) -> FakeQuantize:
    try:
        quantizer = factory(spec, tensor)
        quantizer.quantize(tensor)  # refuses NaN and scales that overflow, before any training
    except ValueError as e:
        raise UserError(f"{name}: {e}") from e
    return quantizer


def fake_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Every quantizer of a prepared model, by path; shared ones once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantize)}


def set_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Turn simulated quantization on or off everywhere (delayed quantization; the float arm of a comparison)."""
    for quantizer in fake_quantizers(model).values():
        quantizer.enabled = enabled


def _observed(model: nn.Module) -> dict[str, Observed]:
    return {n: q for n, q in fake_quantizers(model).items() if isinstance(q, Observed)}


def freeze_observers(model: nn.Module) -> None:
    """Fix every static range; training no longer moves it. Raises UserError if one has never seen a batch."""
    for name, quantizer in _observed(model).items():
        if int(quantizer.batches) == 0:
            raise UserError(f"{name} has never seen a batch: calibrate before freezing, on at least one batch")
        quantizer.active.fill_(False)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> None:
    """Let every static range see `batches`, with fake-quantization off. forward(model, batch) runs the model; track
    shows progress over the batches.

    Raises UserError for an empty calibration set, a layer that no batch reached, or an activation that is not finite.
    """
    observed = _observed(model)
    if not observed:
        return
    if len(batches) == 0:
        raise UserError("the calibration set is empty: static ranges need at least one batch (calibration_batches)")
    states = {name: q.enabled for name, q in fake_quantizers(model).items()}
    training = model.training
    model.eval()
    set_fake_quant(model, False)
    for q in observed.values():
        q.calibrating = True
    try:
        for batch in track(batches):
            forward(model, batch)
    finally:
        for q in observed.values():
            q.calibrating = False
        for name, q in fake_quantizers(model).items():
            q.enabled = states[name]
        model.train(training)
    for name, q in observed.items():
        if int(q.batches) == 0:
            raise UserError(f"calibration never reached {name}: no batch passed through its layer")


@torch.no_grad()
def convert(
    model: nn.Module,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: dict[str, bytes] | None = None,
    path: Path | None = None,
) -> Frozen:
    """Decide the codes of every quantized parameter of a prepared model; the rest is kept as it is.

    config defaults to the model's own `config.to_dict()` if it has one. path: write the folder there (`Frozen.save`)
    as codes are decided, and return what reads from it, so that the model is in memory once; without it the result
    holds a copy of everything. Raises UserError naming the tensor if a quantized
    one is not finite or another holds NaN, or if nothing is prepared.
    """
    layers: dict[str, QuantLayer] = {}
    inputs: dict[str, FrozenInput] = {}
    owners: dict[int, str] = {}
    for module, layer in model.named_modules():
        if not isinstance(layer, QuantLayer):
            continue
        name = f"{module}.weight" if module else "weight"
        if layer.weight_quantizer is not None and id(layer.weight) not in owners:
            layers[name] = layer
            owners[id(layer.weight)] = name
        if layer.input_quantizer is not None:
            inputs[module] = _input(module, layer.input_quantizer)
    if not layers and not inputs:
        raise UserError("nothing to convert: the model has no fake-quantized layer; call prepare first")
    floats, ties = _floats(model, owners)
    if config is None and hasattr(model, "config"):
        own: Any = model.config
        config = dict(own) if isinstance(own, dict) else {**own.to_dict(), "architectures": [type(model).__name__]}
    rest = inputs, ties, config or {}, tokenizer or {}
    if path is None:
        weights = {name: _decided(name, layer) for name, layer in layers.items()}
        return Frozen(weights, {n: t.cpu().clone() for n, t in floats.items()}, *rest)
    shapes = {n: _blank(layer) for n, layer in layers.items()}
    announced = Frozen(shapes, {n: t.to("meta") for n, t in floats.items()}, *rest)
    with closing(ahead(lambda name: _decided(name, layers[name]).tensors(name), layers)) as made:
        return write_frozen(path, announced, chain(Frozen({}, floats, *rest).tensors(), chain.from_iterable(made)))


def _decided(name: str, layer: QuantLayer) -> FrozenWeight:
    assert layer.weight_quantizer is not None
    with torch.no_grad():
        matrix = layer.canonical(layer.weight.detach())
        try:
            tensor = layer.weight_quantizer.quantize(matrix)
        except ValueError as e:
            raise UserError(f"{name}: {e}") from e
    return FrozenWeight(tensor, layer.kind, tuple(layer.weight.shape))


def _blank(layer: QuantLayer) -> FrozenWeight:
    """What `_decided` will have the dtypes and shapes of."""
    assert layer.weight_quantizer is not None
    rows, cols = layer.canonical(layer.weight.detach()).shape
    return FrozenWeight(blank((rows, cols), layer.weight_quantizer.spec), layer.kind, tuple(layer.weight.shape))


def _floats(model: nn.Module, owners: dict[int, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(parameters and persistent buffers that have no codes, as they are, by name; ties, quantized ones included).

    owners: the name of each quantized parameter by its identity.
    """
    owners = dict(owners)
    quantized = set(owners.values())
    floats: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    skip = tuple(f"{n}." for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, FakeQuantize))
    for name, p in model.named_parameters(remove_duplicate=False):
        if name.startswith(skip) or name in quantized:
            continue
        if id(p) in owners:
            ties[name] = owners[id(p)]
        else:
            owners[id(p)] = name
            floats[name] = p.detach()
    persistent = model.state_dict()
    floats |= {n: b.detach() for n, b in model.named_buffers() if n in persistent and not n.startswith(skip)}
    for name, t in floats.items():
        wide = t.is_floating_point() and t.numel() and t.itemsize > 1  # torch compares no float8
        if wide and bool(t.amax().isnan()):  # which NaN spreads to, without a copy
            raise UserError(f"{name} holds NaN: training has diverged; take an earlier checkpoint or a lower rate")
    return floats, ties


def _input(path: str, q: FakeQuantize) -> FrozenInput:
    if isinstance(q, Observed):
        if int(q.batches) == 0:
            raise UserError(f"the input of {path} has no range: calibrate, or train a step, before converting")
        offset = None if q.offset is None else q.offset.detach().clone()
        return FrozenInput(q.spec, True, q.scale.detach().clone(), offset)
    return FrozenInput(q.spec, False)
