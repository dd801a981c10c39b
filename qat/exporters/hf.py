"""A Hugging Face folder with packed integer weights, for any architecture that transformers has.

Where vLLM computes exactly what was trained (see compressed_tensors.py) `quant_method` is "compressed-tensors", else
"qat": `from_pretrained` loads that after `import qat`, and without it raises an error instead of inventing weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qat.errors import UserError, understood
from qat.exporters import compressed_tensors
from qat.exporters.compressed_tensors_read import our_name, ours, translate
from qat.exporters.hf_folder import (
    base_config,
    float_dtype,
    floats_of,
    opened,
    parts_of,
    read_config,
    read_tensors,
    refuse_model,
    tokenizer_files,
    weight_files,
    write,
)
from qat.exporters.hf_layout import Part, decode, describe, encode, encode_input
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.runtimes.environments import missing_environment
from qat.scheme import GELUS, KV_CACHES, QuantSpec, matrix

RUNTIME = "transformers_folder"
APPENDS = True
# qat.packed computes the first two
__all__ = ["GELUS", "KV_CACHES", "RUNTIME", "caveats", "export", "header", "read", "readers", "refuse", "runtime"]


def runtime(path: Path) -> str:
    """vLLM for a folder on vLLM's formulas, where its environment has been made; else transformers.

    Raises UserError if `path` is no Hugging Face folder.
    """
    found = read_config(path).get("quantization_config") or {}
    return "vllm" if compressed_tensors.for_vllm(found) and missing_environment("vllm") is None else RUNTIME


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why the folder cannot hold this parameter, and what to do; None if it can."""
    if reason := refuse_model(config):
        return reason
    if spec is not None and matrix(kind, shape)[1] == 1:
        return "a layer with one input packs into the shape of its float weight; leave it out of the rules"
    return None


def export(frozen: Frozen, path: Path) -> None:
    """Write config.json, model.safetensors (in shards from 5 GB on) and the tokenizer's files into the folder `path`.

    Raises UserError for a model that is not transformers'.
    """
    for name, w in frozen.weights.items():
        if reason := refuse(name, w.kind, w.shape, w.tensor.spec, frozen.config or {"": None}):
            raise UserError(f"{name}: {reason}")
    plain = _plain(frozen)
    write(path, header(frozen), frozen, lambda f: packed_tensors(f, plain))


def _plain(frozen: Frozen) -> bool:
    return compressed_tensors.why_not(frozen, float_dtype(frozen)) is None


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json."""
    described = compressed_tensors.describe(frozen) if _plain(frozen) else describe(frozen)
    return base_config(frozen) | {"quantization_config": described}


def caveats(frozen: Frozen) -> list[str]:
    """What transformers does differently from training with a folder that it reads without `import qat`."""
    return compressed_tensors.caveats(frozen) if _plain(frozen) else []


def readers(frozen: Frozen) -> list[str]:
    """Who cannot load the folder, and why."""
    why = compressed_tensors.why_not(frozen, float_dtype(frozen))
    return [] if why is None else [f"vLLM and plain transformers cannot read it ({why}); `import qat` first"]


def packed_tensors(frozen: Frozen, plain: bool) -> Iterator[tuple[str, Part]]:
    """What makes every tensor of the folder. plain: under compressed-tensors' names."""
    yield from floats_of(frozen)
    dtype = float_dtype(frozen)

    def parts(name: str, w: FrozenWeight) -> dict[str, Part]:
        given = frozen.inputs.get(name.removesuffix(".weight"))
        return compressed_tensors.tensors(name, w, given, dtype) if plain else encode(name, w.tensor)

    yield from parts_of(frozen, parts)
    for name, i in frozen.inputs.items():
        yield from () if plain else encode_input(name, i).items()


def quantization(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config without its quantization, the quantization as `hf_layout.describe` writes it) of a folder.

    Reads the names, shapes and dtypes of the tensors but not their contents, except compressed-tensors' `_shape`.
    Raises UserError if the folder is not quantized in a way that can be read here, VerifyError if it is damaged.
    """
    config = read_config(path)
    with understood(path / "config.json"):
        return config, _described(path, config.pop("quantization_config", None) or {})


def _described(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    method = found.get("quant_method")
    if method == "qat":
        return found
    if method != compressed_tensors.METHOD:
        said = f"its quant_method is {method!r}" if method else "it is not quantized"
        raise UserError(f"{path}: {said}; only quant_method 'qat' and 'compressed-tensors' can be read here")
    return translate(found, *_shapes_and_scales(path))


def _shapes_and_scales(path: Path) -> tuple[dict[str, list[int]], dict[str, torch.dtype]]:
    """Of compressed-tensors: the float shape of every quantized weight, the dtypes of its and its input's scales."""
    shapes: dict[str, list[int]] = {}
    scales: dict[str, torch.dtype] = {}
    for file in weight_files(path):
        with opened(file) as f:
            for key in f.keys():  # noqa: SIM118
                if key.endswith(".weight_shape"):
                    shapes[key.removesuffix("_shape")] = f.get_tensor(key).tolist()
                elif key.endswith((".weight_scale", ".input_scale")):
                    scales[key.removesuffix("_scale")] = f.get_slice(key)[:0].dtype
                elif key.endswith(".weight") and f.get_slice(key).get_dtype() == "I8":
                    shapes[key] = list(f.get_slice(key).get_shape())
    return shapes, scales


def read(path: Path) -> Frozen:
    """The folder back as codes, scales and floats, from either dialect, other writers' compressed-tensors included.

    Raises UserError if it is not such a folder, and anything (see reading.py) if it is damaged.
    """
    path = Path(path)
    config, described = quantization(path)
    weights, inputs = {}, {}
    tensors = {n: ours(n, t, described) for key, t in read_tensors(path)[0].items() if (n := our_name(key))}
    specs = [QuantSpec.from_dict(s) for s in described["specs"]]
    for name, entry in described["weights"].items():
        with understood(f"{path}: {name}"):
            weights[name] = decode(name, tensors, entry, specs[entry["spec"]])
    for module, entry in described["inputs"].items():
        scale, offset = (tensors.pop(f"{module}.input_{part}", None) for part in ("scale", "offset"))
        inputs[module] = FrozenInput(specs[entry["spec"]], entry["static"], scale, offset)
    ties: dict[str, str] = dict(described["ties"])
    return Frozen(weights, tensors, inputs, ties, config, tokenizer_files(path))
