"""ONNX, for ONNX Runtime: sequential networks (config["layers"]) and language models.

The graph is built from `Frozen` alone; each of the two kinds has a file of its own.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch

from qat.errors import UserError, understood
from qat.exporters import onnx_compare, onnx_sequential, onnx_text
from qat.exporters.onnx_graph import METADATA
from qat.exporters.onnx_read import read_sequential
from qat.exporters.onnx_text_read import read_text
from qat.files import MANIFEST
from qat.frozen import Frozen
from qat.scheme import QuantSpec, Scheme

RUNTIME = "ort"
APPENDS = True
FILE = "model.onnx"


def missing_runtime() -> str | None:
    """What to install where ONNX Runtime is not there; None if it is."""
    return None if find_spec("onnxruntime") else "pip install onnxruntime"


def _kind(config: dict[str, Any]) -> ModuleType:
    return onnx_sequential if "layers" in config else onnx_text


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why this target cannot hold the parameter, and what to do; None if it can."""
    return _kind(config).refuse_parameter(name, kind, shape, spec, config)


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why a layer's input cannot be on the grid that its scheme gives it, and what to do; None if it can."""
    return _kind(config).refuse_scheme(scheme, config)


def refuse_tokenizer(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """Text needs a tokenizer that runs without transformers."""
    return None if "tokenizer.json" in files else "the tokenizer has no tokenizer.json: load it as a fast tokenizer"


def stored_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """The dtype of an unquantized parameter in the file (biases: int32, as wide)."""
    return torch.float32


def export(frozen: Frozen, path: Path) -> None:
    """Write path/model.onnx, and the tokenizer's files beside it. Raises UserError for an input or bias that the
    operators cannot hold."""
    for name, scheme in frozen.schemes().items():
        if why := refuse_scheme(scheme, frozen.config):
            raise UserError(f"export to onnx: the input of {name}: {why}")
    _kind(frozen.config).export(frozen, path / FILE)
    for name, content in frozen.tokenizer.items():
        (path / name).write_bytes(content)


def header(frozen: Frozen) -> onnx.ModelProto:
    """The graph that `export` writes of `frozen`; a language model's parameters have no data in it.

    Raises UserError for a model that has no graph.
    """
    try:
        return _kind(frozen.config).header(frozen)
    except UserError:
        raise
    except Exception as e:  # of many kinds: what a shape that does not fit meets first
        raise UserError(f"the weights and the configuration do not make a graph ({type(e).__name__}: {e})") from e


def compare_header(path: Path, want: onnx.ModelProto) -> list[str]:
    """The first thing in which the graph of a file (or of a folder with it) is not `want`, in one sentence.

    Raises anything (see reading.py) if the file is damaged.
    """
    file = _file(path)
    with understood(file):  # external data stay where they are: of parameters only shapes are compared
        return onnx_compare.difference(onnx.load(str(file), load_external_data=False), want, file.parent)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def read(path: Path) -> Frozen:
    """The file (or a folder with it) -> codes, scales, zero points, floats and tokenizer. Raises VerifyError for a
    graph that computes something else, and anything (see reading.py) if the file is damaged."""
    file = _file(path)
    with understood(file):
        onnx.checker.check_model(str(file))
        model = onnx.load(str(file))
    told = json.loads({p.key: p.value for p in model.metadata_props}[METADATA])
    frozen = (read_sequential if "layers" in told["config"] else read_text)(model, told)
    folder = file.parent
    if path.is_dir() or (folder / MANIFEST).is_file():
        ours = (FILE, f"{FILE}.data", MANIFEST, "README.md")
        files = [f for f in sorted(folder.iterdir()) if f.is_file() and f.name not in ours]
        frozen.tokenizer = {f.name: f.read_bytes() for f in files}
    return frozen
