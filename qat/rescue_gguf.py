"""config.json and tokenizer of a GGUF file that another tool wrote, from its metadata, with transformers' own readers.

Where transformers guesses, llama.cpp's rule is put in its place: the pre-tokenizer that the file names, and the space
before a text, so that what is rebuilt splits text as llama.cpp splits it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from qat.errors import UserError
from qat.exporters.gguf_tokenizer import pre_tokenizer_steps

_DROPPED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "rope_theta")


def config_of(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The whole config.json. found: what `gguf.read` understood of the metadata, which goes before transformers' view.

    Raises UserError for an architecture that transformers does not know as GGUF.
    """
    from transformers import AutoConfig

    try:
        made = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        config: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    except (ValueError, KeyError, TypeError) as error:
        kind = found.get("model_type")
        raise UserError(f"{file}: transformers cannot rebuild the config of a {kind} from GGUF ({error})") from error
    config = {**config, **found}
    if "sliding_window" not in found and "sliding_window" in config:
        config["sliding_window"] = None  # llama.cpp computes none; transformers puts its default in
    config = {k: _shortest(v) for k, v in config.items() if k not in _DROPPED}
    rope = config.get("rope_parameters")
    return {**config, "rope_parameters": {k: _shortest(v) for k, v in rope.items()}} if rope else config


def _shortest(value: Any) -> Any:
    """A float32 of the metadata as it was written: 1e-06, not 9.999999974752427e-07. The float32 is the same."""
    if not isinstance(value, float):
        return value
    short = float(str(np.float32(value)))
    return short if np.float32(short) == np.float32(value) and abs(short - value) <= 1e-6 * abs(value) else value


def tokenizer_of(file: Path) -> dict[str, bytes]:
    """The tokenizer's files, by name; nothing where the GGUF file has none. Raises UserError if it is unknown."""
    from transformers import AutoTokenizer

    fields = {k: f for k, f in GGUFReader(file).fields.items() if k.startswith("tokenizer.")}
    if "tokenizer.ggml.model" not in fields or fields["tokenizer.ggml.model"].contents() == "none":
        return {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: transformers cannot rebuild its tokenizer ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir()) if f.is_file()}
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"])
        files["tokenizer.json"] = json.dumps(_as_llama_cpp(spec, fields), ensure_ascii=False).encode()
    return files


def tokenizer_difference(file: Path, other: Path) -> str | None:
    """The first key of the tokenizer's metadata that differs between two GGUF files; None if none does."""
    have, want = (
        {k: f.contents() for k, f in GGUFReader(f).fields.items() if k.startswith("tokenizer.")} for f in (file, other)
    )
    key = next((k for k in sorted({*have, *want}) if have.get(k) != want.get(k)), None)
    return None if key is None else f"the tokenizer differs: {key} in {file} is not that of {other}"


def _as_llama_cpp(spec: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with llama.cpp's own rule for what is done before the merges."""
    kind = fields["tokenizer.ggml.model"].contents()
    if kind == "llama":
        first = fields.get("tokenizer.ggml.add_space_prefix")
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        steps = [{"type": "Prepend", "prepend": "▁"}] if first is None or first.contents() else []
        return {**spec, "normalizer": {"type": "Sequence", "normalizers": [*steps, replaced]}, "pre_tokenizer": None}
    if kind == "gpt2" and (named := fields.get("tokenizer.ggml.pre")) is not None:
        steps, ignore_merges = pre_tokenizer_steps(named.contents())
        model = {**spec["model"], "ignore_merges": ignore_merges}
        return {**spec, "model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return spec
