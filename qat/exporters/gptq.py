"""A GPTQ folder, checkpoint format v2, as gptqmodel and vLLM read it: frozen codes packed, never re-quantized.

For a Linear (out, in) of b bits, groups of g: `qweight` int32 (in * b / 32, out), codes from 0 on packed along `in`;
`qzeros` int32 (in / g, out * b / 32), zero points packed along `out`; `scales` float16 (in / g, out); `g_idx` int32
(in,). Low bits first. Version 1 (target gptq_v1) stores zero points less one, which corrupts neighbours where one is 0.
GPT-2's Conv1D layers lie here as Linear's do.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, VerifyError, understood
from qat.exporters import gptq_layout
from qat.exporters.gptq_layout import (
    bits_of,
    caveats,
    check,
    collect,
    config_of,
    open_folder,
    readers,
    refuse_scheme,
    refuse_together,
    restored,
    scales,
    tensors,
    zeros,
)
from qat.exporters.hf_folder import write
from qat.exporters.hf_layout import Part
from qat.filed import words as packed_words
from qat.frozen import Frozen, FrozenWeight
from qat.packing import pack, unpack
from qat.runtimes.environments import missing_environment
from qat.scheme import QuantSpec

RUNTIME = "transformers_folder"
APPENDS = True
METHOD = "gptq"
BITS = (2, 4, 8)
VERSIONS = ("gptq", "gptq_v2")
# where transformers' loader looks for layers (optimum.gptq.constants.BLOCK_PATTERNS)
BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
PARTS = ("qweight", "qzeros", "scales", "g_idx")

__all__ = [
    "RUNTIME",
    "caveats",
    "export",
    "header",
    "missing_runtime",
    "read",
    "readers",
    "refuse",
    "refuse_scheme",
    "refuse_together",
]


def missing_runtime() -> str | None:
    """How to make the environment that this target is proven in; None if it is there."""
    return missing_environment("gptqmodel")


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why GPTQ cannot hold this parameter, and what to do; None if it can."""
    if why := gptq_layout.refuse(kind, shape, spec, config, METHOD, BITS):
        return why
    if spec is not None and config and not name.startswith(BLOCKS):
        return f"transformers looks for GPTQ layers in {', '.join(BLOCKS)} alone; leave it out of the rules"
    return None


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for weights on different grids or quantized inputs."""
    write_version(frozen, path, version=2)


def write_version(frozen: Frozen, path: Path, version: int) -> None:
    """`export` in checkpoint format 1 or 2."""
    write(path, header(frozen, version), frozen, partial(tensors, lambda w: words(w, version)))


def header(frozen: Frozen, version: int = 2) -> dict[str, Any]:
    """config.json. Raises UserError for weights on different grids or quantized inputs."""
    spec = check(frozen)
    quantized = sorted({n.removesuffix(".weight").split(".", 3)[-1] for n in frozen.weights})
    quantization = {
        "quant_method": METHOD,
        "checkpoint_format": VERSIONS[version - 1],
        "bits": spec.type.bits,
        "group_size": spec.block[1],
        "sym": spec.offset is None,
        "desc_act": False,
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": [quantized],
    }
    return config_of(frozen, quantization)


def words(w: FrozenWeight, version: int) -> dict[str, Part]:
    """The four tensors of one layer. Version 1 takes zero points of at least 1."""
    bits, columns, groups = w.tensor.spec.type.bits, w.tensor.shape[1], w.tensor.scale.shape[1]
    return {
        "qweight": lambda: packed_words(w.tensor).t().contiguous(),
        "qzeros": lambda: pack((zeros(w) - (2 - version)).t(), bits).contiguous(),
        "scales": lambda: scales(w),
        "g_idx": lambda: (torch.arange(columns) // (columns // groups)).int(),
    }


def read(path: Path) -> Frozen:
    """The folder back, of any writer, version 1 or 2. Raises UserError if it is not GPTQ or of another version, and
    anything (see reading.py) if it is damaged."""
    path = Path(path)
    config, found, about, tensors = open_folder(path, METHOD)
    version = found.get("checkpoint_format", found.get("format", "gptq"))
    if version not in VERSIONS:
        raise UserError(f"{path}: checkpoint_format {version!r} is not known; {' and '.join(VERSIONS)} can be read")
    weights: dict[str, FrozenWeight] = {}
    for module in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        with understood(f"{path}: {module}.weight"):
            parts = [tensors.pop(f"{module}.{k}") for k in PARTS[:3]]
            order = tensors.pop(f"{module}.g_idx", None)  # some writers leave it out where it is the usual one
            if order is not None:
                _refuse_order(path, module, order, parts, bits_of(found), bool(found.get("desc_act")))
            weights[f"{module}.weight"] = _weight(f"{module}.weight", parts, found, about, version == VERSIONS[0])
    return collect(path, config, about, weights, tensors)


def _refuse_order(path: Path, module: str, order: Tensor, parts: list[Tensor], bits: int, said: bool) -> None:
    """Raises UserError if the columns of a group do not lie together, as the file said; VerifyError if it did not."""
    columns, groups = parts[0].shape[0] * 32 // bits, parts[2].shape[0]
    if torch.equal(order.long(), torch.arange(columns) // (columns // groups)):
        return
    if not said:
        raise VerifyError(f"{path}: {module}.weight has its columns in another order (g_idx), but desc_act is false")
    raise UserError(
        f"{path}: the columns of {module}.weight are grouped by importance (desc_act, g_idx), which cannot be read "
        "here; quantize with desc_act false"
    )


def _weight(
    name: str, parts: list[Tensor], found: dict[str, Any], about: dict[str, Any], version_1: bool
) -> FrozenWeight:
    qweight, qzeros, scales = parts
    bits = bits_of(found)
    rows, columns = qweight.shape[1], qweight.shape[0] * 32 // bits
    codes = unpack(qweight.t().contiguous(), bits, columns).int()
    zero = unpack(qzeros, bits, rows).t().int()
    if version_1:
        zero = (zero + 1) % 2**bits
    return restored(name, codes, zero.contiguous(), scales.t().contiguous(), found, about)
