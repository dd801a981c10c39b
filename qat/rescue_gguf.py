"""config.json and tokenizer of a GGUF file that another tool wrote, from its metadata, with transformers' own readers.

Where transformers guesses, llama.cpp's rule is put in its place: the pre-tokenizer that the file names, and the space
before a text, so that what is rebuilt splits text as llama.cpp splits it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, ReaderField

from qat.errors import UserError, understood
from qat.exporters.gguf_models import DERIVED, FAMILIES, read_rope
from qat.exporters.gguf_tokenizer import pre_tokenizer_steps

_DROPPED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "rope_theta")
TOKENIZER_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


def config_of(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The whole config.json. found: what `gguf.read` understood of the metadata, which goes before transformers' view.

    Raises UserError for rotary positions that config.json cannot be told.
    """
    from transformers import AutoConfig

    try:
        made = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        config: dict[str, Any] = {**json.loads(made.to_json_string(use_diff=False)), **found}
    except (ValueError, KeyError, TypeError):  # an architecture that transformers does not read from GGUF
        config = _from_metadata(file, found)
    if "sliding_window" not in found and "sliding_window" in config:
        config["sliding_window"] = None  # llama.cpp computes none; transformers puts its default in
    if (config.get("pad_token_id") or 0) >= config["vocab_size"]:
        config["pad_token_id"] = None  # transformers' default, of another vocabulary
    config = {k: v for k, v in config.items() if k not in _DROPPED}
    rope = _rope(file)  # of which transformers reads the base alone
    original = "original_max_position_embeddings"  # phi3 has it twice
    config |= {original: rope[original]} if original in config and original in rope else {}
    return _shortest({**config, "rope_parameters": rope} if rope else config)


def _from_metadata(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """transformers' defaults for this model type, and over them what the metadata and llama.cpp itself fix."""
    from transformers import AutoConfig

    fields = GGUFReader(file).fields
    made = AutoConfig.for_model(**{k: v for k, v in found.items() if k not in _DROPPED})
    config: dict[str, Any] = json.loads(made.to_json_string(use_diff=False))
    activation = FAMILIES[found["model_type"]].activations[0]
    config |= {key: activation for key in ("hidden_act", "hidden_activation") if config.get(key)}
    if (tokens := fields.get("tokenizer.ggml.tokens")) is not None:
        config["vocab_size"] = len(tokens.data)
    for kind in ("bos", "eos", "pad"):
        token = fields.get("tokenizer.ggml.padding_token_id" if kind == "pad" else f"tokenizer.ggml.{kind}_token_id")
        config[f"{kind}_token_id"] = None if token is None else token.contents()
    return config


def _rope(file: Path) -> dict[str, Any]:
    reader = GGUFReader(file)
    derived = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors if t.name in DERIVED}
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
    try:
        return read_rope(fields, derived)
    except UserError as why:
        raise UserError(f"{file}: {why}") from why


def _shortest(value: Any) -> Any:
    """Every float32 of the metadata as it was written: 1e-06, not 9.999999974752427e-07. The float32 is the same."""
    if isinstance(value, dict):
        return {k: _shortest(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortest(v) for v in value]
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
    with tempfile.TemporaryDirectory() as folder:
        try:
            try:
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            except ValueError:  # an architecture that transformers does not read, with a tokenizer that it does
                _tokenizer_alone(Path(folder, "tokenizer.gguf"), fields)
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="tokenizer.gguf")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: transformers cannot rebuild its tokenizer ({error})") from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir()) if f.is_file()}
    if "tokenizer.json" in files:
        spec = json.loads(files["tokenizer.json"])
        files["tokenizer.json"] = json.dumps(_as_llama_cpp(spec, fields), ensure_ascii=False).encode()
    return files


def _tokenizer_alone(file: Path, fields: dict[str, ReaderField]) -> None:
    """Write a GGUF file with these fields and no tensors, of an architecture with such a tokenizer."""
    w = GGUFWriter(file, "gpt2" if fields["tokenizer.ggml.model"].contents() == "gpt2" else "gemma2")
    for name, field in fields.items():
        w.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def tokenizer_difference(file: Path, other: Path) -> str | None:
    """The first key of the tokenizer's metadata that differs between two GGUF files; None if none does."""
    have, want = _tokenizer_fields(file), _tokenizer_fields(other)
    key = next((k for k in sorted({*have, *want}) if have.get(k) != want.get(k)), None)
    return None if key is None else f"the tokenizer differs: {key} in {file} is not that of {other}"


def _tokenizer_fields(file: Path) -> dict[str, Any]:
    with understood(file):
        return {k: f.contents() for k, f in GGUFReader(file).fields.items() if k.startswith("tokenizer.")}


def vocabulary_difference(file: Path, files: dict[str, bytes]) -> str | None:
    """The first token or merge of a GGUF file that is not that of tokenizer.json in `files`; None if none differs."""
    if "tokenizer.json" not in files:
        return None
    spec = json.loads(files["tokenizer.json"])
    fields = _tokenizer_fields(file)
    have, merged = (fields.get(name, []) for name in TOKENIZER_LISTS)
    used = spec["model"].get("vocab", {})
    if not isinstance(used, dict):  # Unigram's list
        return None
    used = {**{i: t for t, i in used.items()}, **{t["id"]: t["content"] for t in spec.get("added_tokens", [])}}
    for i, text in sorted(used.items()):
        held = have[i] if i < len(have) else None
        if held is None or held.replace(" ", "▁") != text.replace(" ", "▁"):
            return f"the tokenizer differs: token {i} is {held!r} in {file}, not {text!r}"
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges", [])]
    if merged and merged != merges:
        at = next((i for i, pair in enumerate(zip(merged, merges, strict=False)) if pair[0] != pair[1]), len(merges))
        return f"the tokenizer differs: its merges in {file} are others from number {at} on"
    return None


def _as_llama_cpp(spec: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json with llama.cpp's own rule for what is done before the merges."""
    kind = fields["tokenizer.ggml.model"].contents()
    count = len(fields["tokenizer.ggml.tokens"].data)  # transformers' classes add their own beyond them
    spec = {**spec, "added_tokens": [t for t in spec["added_tokens"] if t["id"] < count]}
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
