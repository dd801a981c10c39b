"""What all targets in Hugging Face folders share: config.json, weight files in shards, the tokenizer; and reading them.

A target that is not "hf" itself also keeps `hf_layout.describe` under the config's key "qat": its own format does not
say in which dtype a scale was decided, or by which rule.
"""

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.affine import QTensor
from qat.errors import UserError, VerifyError, understood
from qat.exporters.hf_layout import Part, describe, narrow
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import QuantSpec, check_block, stored_dtype
from qat.streams import Behind, Writer, info

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_OURS = {"config.json", INDEX, "manifest.json", "README.md"}


def refuse_model(config: dict[str, Any]) -> str | None:
    """Why a Hugging Face folder cannot hold this model; None if it can."""
    if config and not config.get("model_type"):
        return "this is not a transformers model (its config has no model_type); export it to onnx"
    return None


def float_dtype(frozen: Frozen) -> torch.dtype:
    """The dtype in which the model must be loaded for its unquantized parameters to keep their values."""
    found = [t.dtype for t in frozen.floats.values() if t.is_floating_point()]
    return reduce(torch.promote_types, found) if found else torch.float32


def base_config(frozen: Frozen) -> dict[str, Any]:
    """config.json without anything about quantization."""
    config = {k: v for k, v in frozen.config.items() if k != "_name_or_path"}
    return config | {"dtype": str(float_dtype(frozen)).removeprefix("torch.")}


def described(frozen: Frozen) -> dict[str, Any]:
    """The config's key "qat"."""
    return {"qat": {k: v for k, v in describe(frozen).items() if k not in ("quant_method", "format")}}


def write(
    path: Path,
    config: dict[str, Any],
    frozen: Frozen,
    tensors: Callable[[Frozen], Iterator[tuple[str, Part]]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the folder. tensors: what is stored of a Frozen, asked first for one without storage, to learn the shapes,
    then for `frozen`, to make each tensor when its place in the file has come, so that a file only grows. metadata: of
    every weight file's header."""
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for name, content in frozen.tokenizer.items():
        (path / name).write_bytes(content)
    infos = {n: info(make()) for n, make in tensors(frozen.blank())}
    blank = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape) in infos.items()}
    split = split_torch_state_dict_into_shards(blank, max_shard_size=SHARD_BYTES)
    header = {"format": "pt", **(metadata or {})}
    makers = dict(tensors(frozen))
    for file, names in split.filename_to_tensors.items():
        with Writer(path / file, {n: infos[n] for n in names}, header) as writer, Behind(writer.put) as put:
            for name in list(writer.places):
                put(name, makers[name]())
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")


def parts_of(frozen: Frozen, parts: Callable[[str, FrozenWeight], dict[str, Part]]) -> Iterator[tuple[str, Part]]:
    """Of every weight the parts that `parts` gives it; the weight is read when one is made, and let go with it."""
    for name in frozen.weights:
        for key in parts(name, frozen.weights[name]):
            yield key, partial(_part, frozen, parts, name, key)


def _part(frozen: Frozen, parts: Callable[[str, FrozenWeight], dict[str, Part]], name: str, key: str) -> Tensor:
    return parts(name, frozen.weights[name])[key]()


def floats_of(frozen: Frozen) -> Iterator[tuple[str, Part]]:
    """Every float under its own name."""
    return ((name, partial(frozen.floats.__getitem__, name)) for name in frozen.floats)


def read_config(path: Path) -> dict[str, Any]:
    """config.json, with AutoGPTQ's quantize_config.json in it if the quantization is there alone. Raises UserError if
    it is missing or not valid JSON."""
    try:
        config: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
        beside = path / "quantize_config.json"
        if beside.is_file() and "quantization_config" not in config:
            config["quantization_config"] = {"quant_method": "gptq", **json.loads(beside.read_text(encoding="utf-8"))}
        return config
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path / 'config.json'} is missing or not valid JSON ({e})") from e


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder. Raises UserError if there are none, VerifyError if one of them is missing."""
    if (path / INDEX).is_file():
        with understood(path / INDEX):
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / n for n in names]
    elif (path / WEIGHTS).is_file():
        files = [path / WEIGHTS]
    elif len(found := sorted(path.glob("*.safetensors"))) == 1:  # AutoGPTQ's, such as gptq_model-4bit-128g
        return found
    else:
        raise UserError(f"{path} holds no {WEIGHTS} (or its shards and {INDEX})")
    if lost := [f for f in files if not f.is_file()]:
        raise VerifyError(f"{lost[0]} is listed in the index but missing")
    return files


@contextmanager
def opened(file: Path) -> Generator[Any]:
    """A safetensors file, open. Raises VerifyError if it is damaged."""
    try:
        with safe_open(file, "pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise VerifyError(f"{file} cannot be read: {e}") from e


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(every tensor of the folder, the headers' metadata). Raises VerifyError if a file is damaged."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in weight_files(path):
        with opened(file) as f:
            metadata |= f.metadata() or {}
            tensors |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    return tensors, metadata


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The folder's files that are not weights, configuration, manifest or card."""
    files = [f for f in sorted(path.iterdir()) if f.is_file() and f.name not in _OURS and f.suffix != ".safetensors"]
    return {f.name: f.read_bytes() for f in files}


def frozen_weight(
    unsigned: Tensor, scale: Tensor, offset: Tensor | None, spec: QuantSpec, said: QuantSpec | None
) -> FrozenWeight:
    """A Linear's weight read from a file: `unsigned` codes (out, in) from 0 on, a zero point counted likewise.

    spec: what the format says; said: what the config's key "qat" does. Of the latter only what the format cannot say
    is believed: whether codes are signed, and narrower dtypes that change no value. Raises ValueError if the two
    contradict each other.
    """
    if said is not None:
        shape = unsigned.shape[0], unsigned.shape[1]
        same = check_block(shape, said.block) == check_block(shape, spec.block)
        if not same or (said.type.bits, said.offset is None) != (spec.type.bits, spec.offset is None):
            raise ValueError(f"the file says {spec.label()}, its config says {said.label()}")
        spec = said
    low = spec.type.qmin
    codes = (unsigned.to(torch.int16) + low).to(spec.type.storage)
    scale = narrow(scale, stored_dtype(spec.scale))
    if offset is not None:
        offset = offset.to(torch.int32) + low if spec.offset == "zero_point" else narrow(offset, _offset_dtype(spec))
    return FrozenWeight(QTensor(codes, scale.contiguous(), offset, spec), "Linear", tuple(codes.shape))


def _offset_dtype(spec: QuantSpec) -> torch.dtype:
    assert spec.offset is not None
    return stored_dtype(spec.offset)


def said_of(name: str, about: dict[str, Any] | None) -> QuantSpec | None:
    """The spec that the config's key "qat" has for a weight; None without that key."""
    if about is None or name not in about["weights"]:
        return None
    return QuantSpec.from_dict(about["specs"][about["weights"][name]["spec"]])


def inputs_of(about: dict[str, Any] | None) -> dict[str, FrozenInput]:
    """The dynamic inputs that the config's key "qat" lists."""
    found = (about or {}).get("inputs", {})
    return {m: FrozenInput(QuantSpec.from_dict(about["specs"][e["spec"]]), e["static"]) for m, e in found.items()}  # pyright: ignore[reportOptionalSubscript]
