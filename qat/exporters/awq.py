"""An AWQ folder, version "gemm", as gptqmodel and vLLM read it: frozen int4 codes packed, never re-quantized.

For a Linear (out, in) in groups of g: `qweight` int32 (in, out / 8), `qzeros` int32 (in / g, out / 8), `scales` float16
(in / g, out). Codes and zero points count from 0 and lie along `out`, eight a word in the order 0 2 4 6 1 3 5 7.
The format is always asymmetric: a symmetric grid has zero points of 8. Activation-aware scaling is not part of it.
GPT-2's Conv1D layers lie here as Linear's do.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, understood
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
METHOD = "awq"
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column ORDER[i]
STRIP = 2**18  # words that are turned at a time
INVERSE = [ORDER.index(i) for i in range(8)]

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
    """Why AWQ cannot hold this parameter, and what to do; None if it can."""
    return gptq_layout.refuse(kind, shape, spec, config, METHOD, (4,))


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for weights on different grids or quantized inputs."""
    write(path, header(frozen), frozen, partial(tensors, words))


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json. Raises UserError as `export` does."""
    spec = check(frozen)
    left = [n for n, t in frozen.floats.items() if t.ndim == 2 and n.endswith(".weight")] + list(frozen.ties)
    quantization = {
        "quant_method": METHOD,
        "version": "gemm",
        "bits": 4,
        "group_size": spec.block[1],
        "zero_point": True,
        "modules_to_not_convert": sorted(n.removesuffix(".weight") for n in left),
    }
    return config_of(frozen, quantization)


def words(w: FrozenWeight) -> dict[str, Part]:
    """The three tensors of one layer."""
    groups = w.tensor.scale.shape[1]
    return {
        "qweight": lambda: _turned(packed_words(w.tensor), w.tensor.shape[1]),
        "qzeros": lambda: _turned(pack(zeros(w), 4), groups),
        "scales": lambda: scales(w),
    }


def _turned(words: Tensor, cols: int) -> Tensor:
    """int32 words (R, ceil(C / 8)) of nibbles along C, in their order -> (C, R / 8) along R, in AWQ's.

    Eight words of eight nibbles are a matrix, which is transposed in three steps (Warren, Hacker's Delight, 7-3): of
    every pair of words that lie `far` apart, the upper nibbles of the one and the lower of the other change places.
    """
    rows, width = len(words) // 8, words.shape[1]
    if words.is_meta:
        return words.new_empty(cols, rows)
    taken = words.view(rows, 8, width).transpose(0, 1)
    out = torch.empty(8, rows, width, dtype=torch.int32)
    step = max(1, STRIP // max(1, 8 * width))
    changed = torch.empty_like(out[:4, :step])
    for i in range(0, rows, step):  # what stays in cache
        strip = out[:, i : i + step]
        for to, row in enumerate(ORDER):
            strip[to] = taken[row, i : i + step]
        for far, lower in ((4, 0xFFFF), (2, 0xFF00FF), (1, 0xF0F0F0F)):
            low, high = strip.view(-1, 2, far, *strip.shape[1:]).unbind(1)
            moved = changed[:, : strip.shape[1]].view(low.shape)
            torch.bitwise_right_shift(low, 4 * far, out=moved).bitwise_xor_(high).bitwise_and_(lower)
            high ^= moved
            low ^= moved.bitwise_left_shift_(4 * far)
    return out.view(8 * rows, width).t().contiguous().view(8 * width, rows)[:cols]


def _unpack(x: Tensor) -> Tensor:
    """int32 words (R, C / 8) of nibbles along C in AWQ's order -> codes (R, C), int32."""
    flat = unpack(x, 4, x.shape[1] * 8)
    return flat.reshape(x.shape[0], -1, 8)[..., INVERSE].reshape(flat.shape).int()


def read(path: Path) -> Frozen:
    """The folder back, of any writer of version "gemm". Raises UserError if it is not AWQ or of another version, and
    anything (see reading.py) if it is damaged."""
    path = Path(path)
    config, found, about, tensors = open_folder(path, METHOD)
    version = found.get("version", found.get("format", "gemm"))
    if str(version).lower() != "gemm" or bits_of(found) != 4:
        raise UserError(f"{path}: version {version!r} with {found['bits']} bits is not known; gemm with 4 can be read")
    weights: dict[str, FrozenWeight] = {}
    for module in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        with understood(f"{path}: {module}.weight"):
            codes, zero = (_unpack(tensors.pop(f"{module}.{k}")).t().contiguous() for k in ("qweight", "qzeros"))
            scale = tensors.pop(f"{module}.scales").t().contiguous()
            weights[f"{module}.weight"] = restored(f"{module}.weight", codes, zero, scale, found, about)
    return collect(path, config, about, weights, tensors)
