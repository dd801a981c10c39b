"""A Hugging Face folder with packed integer weights, for any architecture that transformers has.

Where vLLM computes exactly what was trained (see compressed_tensors.py) `quant_method` is "compressed-tensors", else
"qat": `from_pretrained` loads that after `import qat`, and without it raises an error instead of inventing weights.
"""

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.exporters import compressed_tensors
from qat.exporters.compressed_tensors_read import our_name, ours, translate
from qat.exporters.hf_layout import decode, describe, encode, encode_input, matrix
from qat.frozen import Frozen, FrozenInput
from qat.scheme import QuantSpec

RUNTIME = "transformers_folder"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_OURS = {"config.json", INDEX, "manifest.json", "README.md"}


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why the folder cannot hold this parameter, and what to do; None if it can."""
    if config and not config.get("model_type"):
        return "this is not a transformers model (its config has no model_type); export it to onnx"
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
    dtype = float_dtype(frozen)
    plain = compressed_tensors.why_not(frozen, dtype) is None
    config = {k: v for k, v in frozen.config.items() if k != "_name_or_path"}
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    config |= {"quantization_config": compressed_tensors.describe(frozen) if plain else describe(frozen)}
    tensors = packed_tensors(frozen, plain)
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for name, content in frozen.tokenizer.items():
        (path / name).write_bytes(content)
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({n: tensors[n] for n in names}, path / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def caveats(frozen: Frozen) -> list[str]:
    """What its readers do differently from training, or cannot do; for the model card and the report of `verify`."""
    why = compressed_tensors.why_not(frozen, float_dtype(frozen))
    if why is None:
        return compressed_tensors.caveats(frozen)
    return [f"vLLM and plain transformers cannot read it ({why}); `import qat` first"]


def float_dtype(frozen: Frozen) -> torch.dtype:
    """The dtype in which the model must be loaded for its unquantized parameters to keep their values."""
    found = [t.dtype for t in frozen.floats.values() if t.is_floating_point()]
    return reduce(torch.promote_types, found) if found else torch.float32


def packed_tensors(frozen: Frozen, plain: bool) -> dict[str, Tensor]:
    """Every tensor of the folder. plain: under compressed-tensors' names."""
    out = {n: t.contiguous() for n, t in frozen.floats.items()}
    dtype = float_dtype(frozen)
    for name, w in frozen.weights.items():
        out |= compressed_tensors.tensors(name, frozen, dtype) if plain else encode(name, w.tensor)
    for name, i in frozen.inputs.items():
        out |= {} if plain else encode_input(name, i)
    return out


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError if there are none, VerifyError if one of them is missing."""
    if (path / INDEX).is_file():
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    elif (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise UserError(f"{path} holds no {WEIGHTS} (or its shards and {INDEX})")
    if lost := [n for n in names if not (path / n).is_file()]:
        raise VerifyError(f"{path / lost[0]} is listed in the index but missing")
    return [path / n for n in names]


def quantization(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config without its quantization, the quantization as `hf_layout.describe` writes it) of a folder.

    Reads the names, shapes and dtypes of the tensors but not their contents, except compressed-tensors' `_shape`.
    Raises UserError if the folder is not quantized in a way that can be read here.
    """
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path / 'config.json'} is missing or not valid JSON ({e})") from e
    found = config.pop("quantization_config", None) or {}
    method = found.get("quant_method")
    if method == "qat":
        return config, found
    if method != compressed_tensors.METHOD:
        said = f"its quant_method is {method!r}" if method else "it is not quantized"
        raise UserError(f"{path}: {said}; only quant_method 'qat' and 'compressed-tensors' can be read here")
    shapes: dict[str, list[int]] = {}
    scales: dict[str, torch.dtype] = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as f:
            for key in f.keys():  # noqa: SIM118
                if key.endswith(".weight_shape"):
                    shapes[key.removesuffix("_shape")] = f.get_tensor(key).tolist()
                elif key.endswith((".weight_scale", ".input_scale")):
                    scales[key.removesuffix("_scale")] = f.get_slice(key)[:0].dtype
                elif key.endswith(".weight") and f.get_slice(key).get_dtype() == "I8":
                    shapes[key] = list(f.get_slice(key).get_shape())
    return config, translate(found, shapes, scales)


def read(path: Path) -> Frozen:
    """The folder back as codes, scales and floats, from either dialect, other writers' compressed-tensors included.

    Raises UserError if it is not such a folder, VerifyError if it is damaged.
    """
    path = Path(path)
    config, described = quantization(path)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as f:
                for key in f.keys():  # noqa: SIM118
                    if name := our_name(key):
                        tensors[name] = ours(name, f.get_tensor(key), described)
        except (SafetensorError, OSError) as e:
            raise VerifyError(f"{file} cannot be read: {e}") from e
    specs = [QuantSpec.from_dict(s) for s in described["specs"]]
    weights = {}
    for name, entry in described["weights"].items():
        try:
            weights[name] = decode(name, tensors, entry, specs[entry["spec"]])
        except (KeyError, ValueError, RuntimeError) as e:
            raise VerifyError(f"{path}: {name} cannot be decoded ({e})") from e
    inputs = {}
    for module, entry in described["inputs"].items():
        scale, offset = (tensors.pop(f"{module}.input_{part}", None) for part in ("scale", "offset"))
        inputs[module] = FrozenInput(specs[entry["spec"]], entry["static"], scale, offset)
    files = [f for f in sorted(path.iterdir()) if f.is_file() and f.name not in _OURS and f.suffix != ".safetensors"]
    return Frozen(weights, tensors, inputs, described["ties"], config, {f.name: f.read_bytes() for f in files})
