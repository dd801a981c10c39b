"""A folder for Apple's MLX (mlx-lm), affine: value = scale * code + bias, packed from frozen codes.

For a parameter P.weight (out, in) of b bits, groups of g: `P.weight` uint32 (out, in * b / 32), codes from 0 on, low
bits first and dense; `P.scales` and `P.biases` (out, in / g), in the model's dtype. A symmetric grid has the bias
scale * qmin, which is exact. mlx-lm quantizes embeddings and output heads as well; GPT-2's Conv1D lie as (out, in).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, understood
from qat.exporters.hf_folder import (
    base_config,
    described,
    float_dtype,
    floats_of,
    frozen_weight,
    parts_of,
    read_config,
    read_tensors,
    refuse_model,
    said_of,
    tokenizer_files,
    write,
)
from qat.exporters.hf_layout import Part
from qat.filed import words
from qat.frozen import Frozen, FrozenWeight
from qat.packing import unpack
from qat.runtimes.environments import missing_environment
from qat.scheme import QuantSpec, Scheme

RUNTIME = "mlx"
APPENDS = True
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MODELS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # whose names mlx-lm shares and whose logits were compared
KINDS = ("Linear", "Conv1D", "Embedding")
CONV1D = re.compile(r"(model|transformer)\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")


def missing_runtime() -> str | None:
    """How to make the environment that this target is proven in; None if it is there."""
    return missing_environment("mlx")


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why MLX cannot hold this parameter, and what to do; None if it can."""
    if reason := refuse_model(config):
        return reason
    if config and config["model_type"] not in MODELS:
        return f"mlx-lm was not tried with {config['model_type']}; {', '.join(MODELS)} are what this target writes"
    if config.get("hidden_act", "silu") != "silu":
        return f"mlx-lm computes silu in the place of {config['hidden_act']}; export it to another target"
    if spec is None:
        return None
    bits, block = spec.type.bits, spec.block
    if kind not in KINDS:
        return f"MLX quantizes {', '.join(KINDS)}, not {kind}; leave it out of the rules"
    if bits not in BITS or spec.qtype == "ternary":
        return f"{spec.qtype} does not fit; int{min(BITS, key=lambda b: abs(b - bits))} is the nearest"
    if block[0] != 1 or block[1] not in GROUPS:
        return f"block {block} does not fit; (1, {min(GROUPS, key=lambda g: abs(g - block[1]))}) is the nearest"
    if not isinstance(spec.scale, str) or spec.offset == "zero_point" or (spec.offset and spec.type.qmin):
        return (
            f"grid {spec.label()} does not fit; uint{bits}, range mlx with a floating offset, or symmetric int{bits} do"
        )
    return None


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why this layer's input cannot be as it was trained; None if it is float."""
    return None if scheme.input is None else "its input is quantized, but MLX's affine layers take float inputs"


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for quantized inputs, or scales that the model's dtype cannot hold."""
    for module, scheme in frozen.schemes().items():
        raise UserError(f"{module}: {refuse_scheme(scheme, frozen.config)}")
    if not frozen.weights:
        raise UserError("no weight is quantized, and MLX's affine folder is made of those")
    for name, w in frozen.weights.items():
        if why := refuse_values(name, w, frozen):
            raise UserError(why)
    write(path, header(frozen), frozen, _tensors)


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json."""
    grids: dict[str, dict[str, int]] = {}
    for name in sorted(frozen.weights):
        module, spec = _theirs(name).removesuffix(".weight"), frozen.weights[name].tensor.spec
        grids[module] = {"group_size": spec.block[1], "bits": spec.type.bits}
    first = next(iter(grids.values()), {})
    quantization = {**first, "mode": "affine", **{m: g for m, g in grids.items() if g != first}}
    return base_config(frozen) | described(frozen) | _old_keys(frozen.config) | {"quantization": quantization}


def caveats(frozen: Frozen) -> list[str]:
    """What its reader does differently from training."""
    window = frozen.config.get("sliding_window")
    if window and frozen.config.get("use_sliding_window", True):
        return [f"mlx-lm attends to the whole context: it ignores the sliding window of {window} tokens"]
    return []


def _old_keys(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm reads under names that transformers 5 no longer writes; without them it takes its own defaults."""
    if config.get("model_type") == "gpt2":
        return {"n_ctx": config["n_positions"]}
    rope = config.get("rope_parameters") or {}
    out = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return out


def scales(w: FrozenWeight) -> tuple[Tensor, Tensor]:
    """MLX's scales and biases of one parameter, float32 (out, in / g)."""
    q = w.tensor
    scale = q.scale.float()
    return scale, scale * q.spec.type.qmin if q.offset is None else q.offset.float()


def refuse_values(name: str, w: FrozenWeight, frozen: Frozen) -> str | None:
    """Why the folder cannot hold these very scales and biases, which lie in the model's dtype; None if it can."""
    dtype = float_dtype(frozen)
    if all(torch.equal(t.to(dtype).float(), t) for t in scales(w)):
        return None
    return f"{name} has scales or biases that {dtype} cannot hold: use 'portable' for both"


def _tensors(frozen: Frozen) -> Iterator[tuple[str, Part]]:
    """What makes every tensor of the folder."""
    for name, value in floats_of(frozen):
        yield _theirs(name), (lambda value=value: value().t()) if CONV1D.fullmatch(name) else value
    dtype = float_dtype(frozen)

    def parts(name: str, w: FrozenWeight) -> dict[str, Part]:
        module = _theirs(name).removesuffix(".weight")
        return {
            f"{module}.weight": lambda: words(w.tensor).view(torch.uint32),
            f"{module}.scales": lambda: scales(w)[0].to(dtype),
            f"{module}.biases": lambda: scales(w)[1].to(dtype),
        }

    yield from parts_of(frozen, parts)


def _theirs(name: str) -> str:
    """A parameter's name in mlx-lm: GPT-2's body is `model` there."""
    return "model." + name.removeprefix("transformer.") if name.startswith("transformer.") else name


def _ours(name: str, config: dict[str, Any]) -> str:
    if config.get("model_type") == "gpt2" and name.startswith("model."):
        return "transformer." + name.removeprefix("model.")
    return name


def read(path: Path) -> Frozen:
    """The folder back, other writers' included. Raises UserError if it is not MLX's affine, and anything (see
    reading.py) if it is damaged."""
    path = Path(path)
    config = read_config(path)
    config.pop("quantization_config", None)  # mlx-lm writes the same twice
    found = config.pop("quantization", None)
    if not found or found.get("mode", "affine") != "affine":
        raise UserError(f"{path} is not in MLX's affine quantization: its config has no such key 'quantization'")
    about = config.pop("qat", None)
    tensors = read_tensors(path)[0]
    weights: dict[str, FrozenWeight] = {}
    for module in [n.removesuffix(".scales") for n in tensors if n.endswith(".scales")]:
        with understood(f"{path}: {module}.weight"):
            parts = [tensors.pop(f"{module}.{k}") for k in ("weight", "scales", "biases")]
            grid = found.get(module, found)
            name = _ours(f"{module}.weight", config)
            weights[name] = _weight(name, parts, int(grid["bits"]), int(grid["group_size"]), about)
    floats = {_ours(n, config): t for n, t in tensors.items()}
    floats = {n: t.t().contiguous() if CONV1D.fullmatch(n) else t for n, t in floats.items()}
    return Frozen(weights, floats, ties=(about or {}).get("ties", {}), config=config, tokenizer=tokenizer_files(path))


def _weight(name: str, parts: list[Tensor], bits: int, group: int, about: dict[str, Any] | None) -> FrozenWeight:
    """A grid that is said to be symmetric and whose biases say otherwise is read as they say, for `verify` to name."""
    packed, scale, bias = parts
    codes = unpack(packed.view(torch.int32), bits, scale.shape[1] * group)
    said = said_of(name, about)
    stored = str(scale.dtype).removeprefix("torch.")
    spec = QuantSpec(qtype=f"int{bits}", block=(1, group), scale=stored)
    symmetric = torch.equal(bias.float(), scale.float() * spec.type.qmin)
    if said is not None and said.offset is None and symmetric:
        w = frozen_weight(codes, scale, None, spec, said)
    else:
        said = None if said is not None and said.offset is None else said
        spec = QuantSpec(qtype=f"uint{bits}", block=(1, group), range="mlx", scale=stored, offset=stored)
        w = frozen_weight(codes, scale, bias.contiguous(), spec, said)
    if about is not None:
        entry = about["weights"][name]
        return replace(w, kind=entry["kind"], shape=tuple(entry["shape"]))
    kind = "Embedding" if re.search(r"(wte|embed_tokens)\.weight$", name) else "Linear"
    return replace(w, kind=kind) if not CONV1D.fullmatch(name) else replace(w, kind="Conv1D", shape=w.shape[::-1])
