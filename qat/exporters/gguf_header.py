"""A GGUF file's metadata: what `export` writes of a model, its name and its tokenizer, and what a file says of them."""

import os
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION

from qat.errors import UserError, understood
from qat.exporters.gguf_blocks import block_type
from qat.exporters.gguf_models import FAMILIES, write_metadata
from qat.exporters.gguf_tokenizer import PHI3, swallows_spaces, write_tokenizer
from qat.frozen import Frozen

FILE = "model.gguf"


def _name(config: dict[str, Any], tokenizer: dict[str, bytes]) -> str:
    """`general.name`: the config's own `name` if there is one, else where the model came from.

    llama.cpp reads it: in a model with phi-3 or phi3 in its name, special tokens swallow the spaces after them.
    """
    name = str(config.get("name") or config.get("_name_or_path") or config["model_type"])
    if swallows_spaces(tokenizer):
        return name if PHI3.search(name) else f"{name} (phi-3)"
    return PHI3.sub("phi 3", name)


def _file_type(frozen: Frozen) -> LlamaFileType:
    """By what most quantized weights are, as llama.cpp itself labels files."""
    sizes: dict[str, int] = {}
    for w in frozen.weights.values():
        held = block_type(w.tensor.spec)
        assert held is not None
        name = held.ggml.name
        sizes[name] = sizes.get(name, 0) + w.tensor.shape.numel()
    if not sizes:
        return LlamaFileType.ALL_F32
    most = max(sizes, key=lambda name: sizes[name])
    return LlamaFileType[f"MOSTLY_{most}_S" if most in ("Q4_K", "Q5_K") else f"MOSTLY_{most}"]


def describe(writer: GGUFWriter, frozen: Frozen) -> None:
    """Everything but tokenizer and tensors."""
    writer.add_name(_name(frozen.config, frozen.tokenizer))
    writer.add_file_type(_file_type(frozen))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_metadata(writer, frozen.config)


def embedding_rows(frozen: Frozen) -> int:
    """How many tokens the embedding has."""
    name = f"{FAMILIES[frozen.config['model_type']].embedding}.weight"
    w = frozen.weights.get(name)
    return len(frozen.floats[name] if w is None else w.tensor.codes)


def header(frozen: Frozen) -> dict[str, Any]:
    """The metadata that `export` writes, by key; without the tokenizer's if there is none.

    Raises UserError for a tokenizer that GGUF cannot hold.
    """
    writer = GGUFWriter(os.devnull, MODEL_ARCH_NAMES[FAMILIES[frozen.config["model_type"]].arch])  # never written
    describe(writer, frozen)
    if "tokenizer.json" in frozen.tokenizer:
        write_tokenizer(writer, frozen.tokenizer, frozen.config, embedding_rows(frozen))
    return {key: value.value for part in writer.kv_data for key, value in part.items()}


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a file (or of a folder with one). Raises VerifyError if it cannot be read."""
    file = gguf_file(path)
    with understood(file):
        return {k: f.contents() for k, f in GGUFReader(file).fields.items() if not k.startswith("GGUF.")}


def gguf_file(path: Path) -> Path:
    """`path` itself, or of a folder its model.gguf, else its one .gguf file. Raises UserError if there is none."""
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if path / FILE in found:
        return path / FILE
    if len(found) != 1:
        raise UserError(f"{path} has {len(found)} .gguf files; name one file")
    return found[0]
