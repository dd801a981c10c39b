"""GGUF, for llama.cpp: weights in the block types of gguf_blocks, each tensor its own, tokenizer included.

Codes and stored scales are packed as they are; norms, biases, positions and unquantized weights stay floating point.
"""

import math
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor

from qat.affine import QTensor
from qat.errors import UserError, VerifyError, understood
from qat.exporters.gguf_blocks import BY_GGML, SCHEMES, BlockType, block_type, refuse_grid
from qat.exporters.gguf_families.base import Family
from qat.exporters.gguf_header import FILE, describe, embedding_rows, gguf_file, header, read_header
from qat.exporters.gguf_models import (
    DERIVED,
    FAMILIES,
    MODEL_TYPES,
    names,
    read_config,
    refuse_model,
    refuse_text,
)
from qat.exporters.gguf_tokenizer import known_difference, refuse_tokenizer, write_tokenizer
from qat.exporters.hf_layout import CONV1D
from qat.frozen import Frozen, FrozenWeight
from qat.scheme import GELUS, KV_CACHES, QuantSpec, Scheme
from qat.streams import Behind, Later

RUNTIME = "llama_cpp"
APPENDS = True
__all__ = [
    "FILE",
    "GELUS",
    "KV_CACHES",
    "RUNTIME",
    "SCHEMES",
    "as_held",
    "caveats",
    "export",
    "gguf_file",
    "header",
    "known_difference",
    "missing_runtime",
    "read",
    "read_header",
    "refuse",
    "refuse_scheme",
    "refuse_text",
    "refuse_tokenizer",
    "stored_dtype",
]

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")  # keys of config.json


def missing_runtime() -> str | None:
    """What to install where llama.cpp is not there; None if it is."""
    there = which("llama-server") or find_spec("xllamacpp")
    return None if there else "pip install xllamacpp, or put llama-server on PATH"


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why GGUF cannot hold this parameter (a Hugging Face name), and what to do; None if it can."""
    if reason := refuse_model(config):
        return reason
    family = FAMILIES[config["model_type"]]
    known = names(config["model_type"], family.n_layers(config))
    if name not in known and not (family.tied and name == f"{family.head}.weight"):  # then it is the embedding
        return f"llama.cpp's {config['model_type']} has no tensor for {name}"
    if spec is None:
        return None
    if len(shape) != 2 or name == "transformer.wpe.weight":
        return f"llama.cpp keeps {name} in floating point; leave it out of the rules"
    return refuse_grid(spec)


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why llama.cpp does not quantize the input of a layer of that weight so, and what to do; None if it does."""
    if scheme.input is None:
        return None
    held = None if scheme.weight is None else block_type(scheme.weight)
    if held is None:
        return "llama.cpp multiplies float weights with float inputs; leave `input` out of the scheme"
    if scheme.static or scheme.input != held.inputs:
        return (
            f"llama.cpp quantizes inputs of {held.ggml.name} weights in its own way; take the input of scheme="
            f"llama_{held.ggml.name.lower()}, or leave `input` out"
        )
    return None


def caveats(frozen: Frozen) -> list[str]:
    """What llama.cpp rounds that training did not."""
    out: list[str] = []
    taken = {f"{module}.weight" for module in frozen.inputs}
    used = [n for n, w in frozen.weights.items() if w.kind != "Embedding"]
    used += [alias for alias, name in frozen.ties.items() if name in frozen.weights]
    left = [n for n in used if n not in taken and frozen.ties.get(n) not in taken]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        out.append(
            f"llama.cpp rounds the input of {left[0]}{more} to 8 bits, and training left it in floating point; "
            "schemes llama_* train with that"
        )
    activation = [str(v) for key in ACTIVATIONS if (v := frozen.config.get(key))]
    if any("gelu" in a for a in activation) and not frozen.config.get("gelu"):
        out.append("llama.cpp reads GELU from a float16 table, training computed it; scheme.gelu=float16_table has it")
    return out


def _type(w: FrozenWeight) -> BlockType:
    """The block type of a weight that `refuse` let through."""
    found = block_type(w.tensor.spec)
    assert found is not None
    return found


def stored_dtype(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """float16 matrices stay float16 (llama.cpp then computes in it); everything else is float32, which is exact."""
    return dtype if dtype == torch.float16 and len(shape) == 2 and name != "transformer.wpe.weight" else torch.float32


def _stored(name: str, value: Tensor, family: Family) -> Tensor:
    value = value.detach().to(stored_dtype(name, tuple(value.shape), value.dtype))
    return family.stored(name, value)


def as_held(frozen: Frozen) -> Frozen:
    """What `read` finds of `frozen`, to compare with: floats in the dtype of the file, and as the file can say them.

    Gemma's norms are 1 + w there, as the model computes them in float32: many w have the same 1 + w.
    """
    family = FAMILIES.get(frozen.config.get("model_type", ""))
    if family is None:  # then the file is of another model
        return frozen
    floats = Later(frozen.floats, lambda n: family.restored(n, _stored(n, frozen.floats[n], family)))
    return replace(frozen, floats=floats)


def _float_array(name: str, value: Tensor, family: Family) -> np.ndarray:
    value = _stored(name, value, family)
    return (value.t() if name.endswith(CONV1D) else value).contiguous().numpy()


def export(frozen: Frozen, path: Path) -> None:
    """Write `path`/model.gguf. Raises UserError for a model, grid or tokenizer that GGUF cannot hold."""
    config = frozen.config
    for name, w in frozen.weights.items():
        if reason := refuse(name, w.kind, w.shape, w.tensor.spec, config):
            raise UserError(f"{name}: {reason}")
    for name, value in frozen.floats.items():
        if reason := refuse(name, "", tuple(value.shape), None, config):
            raise UserError(f"{name}: {reason}")
    for module, scheme in frozen.schemes().items():
        if reason := refuse_scheme(scheme, config):
            raise UserError(f"the input of {module}: {reason}")
    family = FAMILIES[config["model_type"]]
    table = names(config["model_type"], family.n_layers(config))
    writer = GGUFWriter(path / FILE, MODEL_ARCH_NAMES[family.arch])
    describe(writer, frozen)
    write_tokenizer(writer, frozen.tokenizer, config, embedding_rows(frozen))

    # all tensors are announced first, then packed and written one by one: no second copy of the model in memory
    extra = family.extra_tensors(config)
    floats = Later([*frozen.floats, *extra], lambda n: extra[n] if n in extra else frozen.floats[n])
    for name, value in floats.items():
        array = _float_array(name, value, family)
        writer.add_tensor_info(table.get(name, name), array.shape, array.dtype, array.nbytes)
    for name, w in frozen.weights.items():
        ggml = _type(w).ggml
        shape = quant_shape_to_byte_shape(w.tensor.shape, ggml)
        writer.add_tensor_info(table[name], shape, np.dtype(np.uint8), math.prod(shape), ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Behind(writer.write_tensor_data) as write:
        for name, value in floats.items():
            write(_float_array(name, _reordered(value, family.row_order(name, config)), family))
        for name, w in frozen.weights.items():
            order = family.row_order(name, config)
            data = _type(w).pack(w.tensor)
            write(data if order is None else data[order.numpy()])
    writer.close()


def _reordered(value: Tensor, order: Tensor | None) -> Tensor:
    return value if order is None else value[order]


def read(path: Path) -> Frozen:
    """A GGUF file, of any writer (or a folder with one), -> codes, stored scales and floats under Hugging Face names.

    The tokenizer is not turned back into a tokenizer.json; `config` holds what the metadata says. Raises UserError for
    a model or a tensor type that is unknown here, VerifyError for unknown or overlapping tensors, and anything (see
    reading.py) if the file is damaged.
    """
    file = gguf_file(path)
    with understood(file):
        reader = GGUFReader(file)
        _refuse_overlap(file, reader)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("tokenizer.")}
    if fields.get("general.architecture") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"{file} is a {fields.get('general.architecture')}; models that can be read: {known}")
    config = read_config(fields)
    family = FAMILIES[config["model_type"]]
    if not 0 < family.n_layers(config) <= len(reader.tensors):
        raise VerifyError(f"{file} says that it has {family.n_layers(config)} layers, in {len(reader.tensors)} tensors")
    table = {to: name for name, to in names(config["model_type"], family.n_layers(config)).items()}
    weights: dict[str, FrozenWeight] = {}
    floats: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name in DERIVED:
            continue
        if tensor.name not in table:
            raise VerifyError(f"{file}: unknown tensor {tensor.name}")
        name = table[tensor.name]
        order = family.row_order(name, config)
        back = None if order is None else order.argsort()
        if tensor.tensor_type in BY_GGML:
            weights[name] = _read_weight(name, tensor.data, BY_GGML[tensor.tensor_type], back, family)
        elif tensor.tensor_type in _FLOATS:
            value = torch.from_numpy(np.array(tensor.data)).view(_FLOATS[tensor.tensor_type])
            value = _reordered(value, back)
            value = value.t().contiguous() if name.endswith(CONV1D) else value
            floats[name] = family.restored(name, value)
        else:
            known = ", ".join([t.name for t in BY_GGML] + [t.name for t in _FLOATS])
            raise UserError(f"{file}: {tensor.name} is {tensor.tensor_type.name}; types that can be read: {known}")
    tied = "output.weight" not in {t.name for t in reader.tensors}
    ties = {f"{family.head}.weight": f"{family.embedding}.weight"} if tied else {}
    return Frozen(weights, floats, ties=ties, config=config)


def _refuse_overlap(file: Path, reader: GGUFReader) -> None:
    """Raises VerifyError for two tensors that share bytes, as no writer makes them."""
    tensors = sorted(reader.tensors, key=lambda t: int(t.data_offset))
    for a, b in pairwise(tensors):
        if int(a.data_offset) + int(a.n_bytes) > int(b.data_offset):
            raise VerifyError(f"{file}: the tensors {a.name} and {b.name} overlap")


def _read_weight(name: str, data: np.ndarray, block: BlockType, back: Tensor | None, family: Family) -> FrozenWeight:
    codes, scale, offset = block.unpack(data if back is None else data[back.numpy()])
    tensor = QTensor(codes, scale, offset, block.spec)
    if name.endswith(CONV1D):
        return FrozenWeight(tensor, "Conv1D", (codes.shape[1], codes.shape[0]))
    kind = "Embedding" if name == f"{family.embedding}.weight" else "Linear"
    return FrozenWeight(tensor, kind, tuple(codes.shape))
