"""Codes, scales and offsets <-> the bytes of ggml's blocks. Nothing here quantizes: bytes are only rearranged.

Each type cuts a row into blocks. Source of the layouts: ggml/src/ggml-common.h and ggml-quants.c.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qat.affine import QTensor
from qat.exporters.gguf_k import (
    SUPER,
    SUPER_SIGNED,
    pack_q4_k,
    pack_q5_k,
    pack_q6_k,
    unpack_q4_k,
    unpack_q5_k,
    unpack_q6_k,
)
from qat.scheme import QuantSpec, stored_dtype

Parts = tuple[Tensor, Tensor, Tensor | None]  # codes [N, K], scales [N, K/block], offsets alike or None


class BlockType(NamedTuple):
    """A ggml type, the spec that its bytes stand for, how the CPU quantizes the inputs that it multiplies with such
    weights (ggml's vec_dot_type, x86 arithmetic), and how the bytes are written and read."""

    ggml: GGMLQuantizationType
    spec: QuantSpec
    inputs: QuantSpec
    pack: Callable[[QTensor], np.ndarray]
    unpack: Callable[[np.ndarray], Parts]


def _halves(scale: Tensor) -> np.ndarray:
    """float16 (or portable) scales [N, B] -> their bytes [N, B, 2]."""
    n, blocks = scale.shape
    return scale.to(torch.float16).contiguous().numpy().view(np.uint8).reshape(n, blocks, 2)


def _floats(data: np.ndarray) -> Tensor:
    """Bytes [N, B, 2] -> float16 [N, B]."""
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16)[..., 0].copy())


def _raw(q: QTensor) -> np.ndarray:
    """The codes' bytes [N, B, block]."""
    return q.codes.contiguous().numpy().view(np.uint8).reshape(*q.scale.shape, -1)


def _codes(body: np.ndarray, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(body.astype(dtype).reshape(body.shape[0], -1).copy())


def _blocks(data: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(data).reshape(data.shape[0], -1, size)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """Byte j holds element j (low) and j + 16 (high)."""
    return (raw[..., :16] & 15) | (raw[..., 16:] << 4)


def _from_nibbles(body: np.ndarray) -> np.ndarray:
    return np.concatenate([body & 15, body >> 4], -1)


def _join(*parts: np.ndarray) -> np.ndarray:
    """Parts [N, B, bytes] -> rows of blocks [N, B * bytes]."""
    return np.concatenate(parts, -1).reshape(parts[0].shape[0], -1)


STRIP = 16384  # blocks
_Q4_0 = np.dtype([("scale", "<f2"), ("codes", "<u8", 2)])
_EACH_LOW, _EACH_SIGN, _FOUR = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x8888888888888888), np.uint64(4)


def pack_q4_0(q: QTensor) -> np.ndarray:
    """18 bytes: f16 scale, 16 bytes of nibbles code + 8. Eight codes at a time, as one word."""
    words = q.codes.contiguous().numpy().view(np.uint64).reshape(-1, 4)
    out = np.empty(len(words), _Q4_0)
    out["scale"] = q.scale.to(torch.float16).reshape(-1).numpy()
    for i in range(0, len(words), STRIP):  # strips that stay in cache
        w, to = words[i : i + STRIP], out["codes"][i : i + STRIP]
        for k in (0, 1):  # code + 8 in four bits is the code with its sign bit flipped
            to[:, k] = ((w[:, k] & _EACH_LOW) | ((w[:, k + 2] & _EACH_LOW) << _FOUR)) ^ _EACH_SIGN
    return out.view(np.uint8).reshape(q.scale.shape[0], -1)


def unpack_q4_0(data: np.ndarray) -> Parts:
    """The inverse of `pack_q4_0`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 18)
    return _codes(_from_nibbles(b[..., 2:]).astype(np.int8) - np.int8(8), np.int8), _floats(b[..., :2]), None


def pack_q4_1(q: QTensor) -> np.ndarray:
    """20 bytes: f16 scale, f16 offset (the value of code 0), 16 bytes of nibbles."""
    assert q.offset is not None
    return _join(_halves(q.scale), _halves(q.offset), _nibbles(_raw(q)))


def unpack_q4_1(data: np.ndarray) -> Parts:
    """The inverse of `pack_q4_1`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 20)
    return _codes(_from_nibbles(b[..., 4:]), np.uint8), _floats(b[..., :2]), _floats(b[..., 2:4])


def pack_q5_0(q: QTensor) -> np.ndarray:
    """22 bytes: f16 scale, the fifth bits of code + 16 as one little-endian word, 16 bytes of low nibbles."""
    codes = _raw(q) + np.uint8(16)
    return _join(_halves(q.scale), np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes))


def unpack_q5_0(data: np.ndarray) -> Parts:
    """The inverse of `pack_q5_0`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 22)
    high = np.unpackbits(b[..., 2:6], axis=-1, bitorder="little")
    codes = (_from_nibbles(b[..., 6:]) | (high << 4)).astype(np.int8) - np.int8(16)
    return _codes(codes, np.int8), _floats(b[..., :2]), None


def pack_q5_1(q: QTensor) -> np.ndarray:
    """24 bytes: f16 scale, f16 offset, the fifth bits as in Q5_0, 16 bytes of low nibbles."""
    assert q.offset is not None
    codes = _raw(q)
    high = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return _join(_halves(q.scale), _halves(q.offset), high, _nibbles(codes))


def unpack_q5_1(data: np.ndarray) -> Parts:
    """The inverse of `pack_q5_1`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 24)
    high = np.unpackbits(b[..., 4:8], axis=-1, bitorder="little")
    return _codes(_from_nibbles(b[..., 8:]) | (high << 4), np.uint8), _floats(b[..., :2]), _floats(b[..., 2:4])


def pack_q8_0(q: QTensor) -> np.ndarray:
    """34 bytes: f16 scale, 32 int8 codes."""
    return _join(_halves(q.scale), _raw(q))


def unpack_q8_0(data: np.ndarray) -> Parts:
    """The inverse of `pack_q8_0`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 34)
    return _codes(b[..., 2:].view(np.int8), np.int8), _floats(b[..., :2]), None


def pack_tq2_0(q: QTensor) -> np.ndarray:
    """66 bytes: two runs of 32 bytes, each for 128 elements (bits 2n of byte m: element m + 32 n), then f16 scale."""
    codes = (_raw(q) + np.uint8(1)).reshape(*q.scale.shape, 2, 4, 32)
    body = codes[..., 0, :] | codes[..., 1, :] << 2 | codes[..., 2, :] << 4 | codes[..., 3, :] << 6
    return _join(body.reshape(*q.scale.shape, 64), _halves(q.scale))


def unpack_tq2_0(data: np.ndarray) -> Parts:
    """The inverse of `pack_tq2_0`: rows of bytes uint8 [N, bytes]."""
    b = _blocks(data, 66)
    runs = b[..., :64].reshape(*b.shape[:2], 2, 1, 32)
    codes = (runs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    return _codes(codes.astype(np.int8) - np.int8(1), np.int8), _floats(b[..., 64:]), None


def _symmetric(qtype: str, block: int = 32, **rule: Any) -> QuantSpec:
    return QuantSpec(qtype=qtype, block=(1, block), scale="float16", **rule)


def _minmax(qtype: str) -> QuantSpec:
    return QuantSpec(qtype=qtype, block=(1, 32), range="minmax", scale="float16", offset="float16")


def _super(qtype: str) -> QuantSpec:
    return QuantSpec(qtype=qtype, block=(1, 32), range="minmax_zero", scale=SUPER, offset=SUPER)


_Q6_K = QuantSpec(qtype="int6", block=(1, 16), range="signed_max", scale=SUPER_SIGNED)
_Q8_0 = QuantSpec(qtype="int8", block=(1, 32), divide="reciprocal", scale="float16")
_Q8_1 = QuantSpec(qtype="int8", block=(1, 32), divide="reciprocal", scale="float16", block_sum="float16")
_Q8_K = QuantSpec(qtype="int8", block=(1, 256), divide="reciprocal_scale", scale="float32")
_T = GGMLQuantizationType
TYPES = (
    BlockType(_T.Q4_0, _symmetric("int4", range="signed_max"), _Q8_0, pack_q4_0, unpack_q4_0),
    BlockType(_T.Q4_1, _minmax("uint4"), _Q8_1, pack_q4_1, unpack_q4_1),
    BlockType(_T.Q5_0, _symmetric("int5", range="signed_max"), _Q8_0, pack_q5_0, unpack_q5_0),
    BlockType(_T.Q5_1, _minmax("uint5"), _Q8_1, pack_q5_1, unpack_q5_1),
    BlockType(_T.Q8_0, _symmetric("int8"), _Q8_0, pack_q8_0, unpack_q8_0),
    BlockType(_T.Q4_K, _super("uint4"), _Q8_K, pack_q4_k, unpack_q4_k),
    BlockType(_T.Q5_K, _super("uint5"), _Q8_K, pack_q5_k, unpack_q5_k),
    BlockType(_T.Q6_K, _Q6_K, _Q8_K, pack_q6_k, unpack_q6_k),
    BlockType(_T.TQ2_0, _symmetric("ternary", 256), _Q8_K, pack_tq2_0, unpack_tq2_0),
)
BY_GGML = {t.ggml: t for t in TYPES}
_NAMED = (_T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q8_0, _T.Q4_K, _T.Q6_K, _T.TQ2_0)
SCHEMES = {f"llama_{t.name.lower()}": BY_GGML[t].spec for t in _NAMED}  # of configs/scheme, and their linears' grid


def block_type(spec: QuantSpec) -> BlockType | None:
    """The type whose bytes hold codes, scales and offsets of `spec` exactly; None if there is none."""
    return next((t for t in TYPES if not _differences(spec, t.spec)), None)


def _differences(spec: QuantSpec, held: QuantSpec) -> list[str]:
    """What of `spec` the type of `held` cannot store. How scales are chosen and codes rounded does not matter."""
    return [
        text
        for differs, text in (
            (spec.qtype != held.qtype, f"codes are {spec.qtype}"),
            (spec.block != held.block, f"block is {spec.block}"),
            (
                not _same(spec.scale, held.scale),
                f"scales are {spec.scale if isinstance(spec.scale, str) else 'quantized'}",
            ),
            (not _same(spec.offset, held.offset), _offset(spec.offset)),
        )
        if differs
    ]


def _same(a: str | QuantSpec | None, b: str | QuantSpec | None) -> bool:
    if a is None or b is None or isinstance(a, QuantSpec) or isinstance(b, QuantSpec):
        return a == b
    return "zero_point" not in (a, b) and stored_dtype(a) == stored_dtype(b)


def _offset(offset: str | QuantSpec | None) -> str:
    return (
        "it has no offset"
        if offset is None
        else f"it has an offset ({offset if isinstance(offset, str) else 'quantized'})"
    )


def refuse_grid(spec: QuantSpec) -> str | None:
    """Why GGUF cannot hold this grid, with the nearest one that it can; None if it can."""
    if block_type(spec) is not None:
        return None
    wrong, nearest = min(((_differences(spec, t.spec), t) for t in TYPES), key=lambda p: (len(p[0]), _far(spec, p[1])))
    near = nearest.spec
    scales = "float16 or portable scales" if isinstance(near.scale, str) else "two-level scales"
    kind = "symmetric" if near.offset is None else "asymmetric, floating offset,"
    return (
        f"{', '.join(wrong)}; the nearest GGUF grid is {nearest.ggml.name}: {kind} {near.qtype}, "
        f"block {near.block}, {scales}"
    )


def _far(spec: QuantSpec, t: BlockType) -> int:
    """By code width, wider first."""
    more = t.spec.type.bits - spec.type.bits
    return more if more >= 0 else 8 - more
