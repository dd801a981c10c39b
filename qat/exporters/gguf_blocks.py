"""Codes and scales <-> the bytes of ggml's Q4_0 and Q8_0 blocks. Nothing here quantizes: bytes are only rearranged.

Both cut a row into blocks of 32. Q4_0: float16 scale, then 16 bytes; byte j holds element j (low nibble) and j + 16
(high), each code + 8. Q8_0: float16 scale, then 32 int8 codes. Source: ggml/src/ggml-common.h.
"""

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qat.scheme import STORED, QuantSpec

BLOCK = 32
TYPES = {"int4": GGMLQuantizationType.Q4_0, "int8": GGMLQuantizationType.Q8_0}
QTYPES = {ggml: name for name, ggml in TYPES.items()}


def refuse_grid(spec: QuantSpec) -> str | None:
    """Why GGUF cannot hold this grid, with the nearest one that it can; None if it can."""
    wanted = "int4" if spec.type.bits <= 4 else "int8"
    problems = [
        (spec.qtype not in TYPES, f"codes are {spec.qtype}"),
        (spec.block != (1, BLOCK), f"block is {spec.block}"),
        (spec.offset is not None, f"it has an offset ({spec.offset})"),
        (STORED[spec.scale] != torch.float16, f"scales are {spec.scale}"),
    ]
    found = [text for wrong, text in problems if wrong]
    if not found:
        return None
    return f"{', '.join(found)}; the nearest GGUF grid is symmetric {wanted}, block (1, 32), portable or float16 scales"


def pack(codes: Tensor, scale: Tensor, qtype: str) -> np.ndarray:
    """int8 codes [N, K] and float16 scales [N, K/32] -> uint8 [N, K/32 * 18] ("int4") or [N, K/32 * 34] ("int8")."""
    n, blocks = scale.shape
    body = 16 if qtype == "int4" else 32
    out = np.empty((n, blocks, 2 + body), np.uint8)
    out[..., :2] = scale.contiguous().numpy().view(np.uint8).reshape(n, blocks, 2)
    raw = codes.contiguous().numpy().view(np.uint8)
    if qtype == "int8":
        out[..., 2:] = raw.reshape(n, blocks, BLOCK)
    else:
        halves = raw.reshape(n, blocks, 2, 16)
        q = halves[:, :, 1] << 4
        q |= halves[:, :, 0] & 15
        q ^= 0x88  # code + 8 in four bits is the code with its sign bit flipped
        out[..., 2:] = q
    return out.reshape(n, -1)


def unpack(data: np.ndarray, qtype: str) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: codes int8 [N, K] and scales float16 [N, K/32]."""
    n = data.shape[0]
    blocks = np.ascontiguousarray(data).reshape(n, -1, 18 if qtype == "int4" else 34)
    scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    body = blocks[..., 2:]
    if qtype == "int4":
        codes = np.concatenate([body & 15, body >> 4], -1).astype(np.int8) - np.int8(8)
    else:
        codes = body.view(np.int8)
    return torch.from_numpy(codes.reshape(n, -1).copy()), torch.from_numpy(scale.copy())
