"""Codes, scales and bytes against other people's quantizers, a million elements each, with a spec set to their rule."""

import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from reference import integers

from qat.affine import QTensor, choose_qparams, quantize, tile
from qat.scheme import QuantSpec

SHAPE = (1024, 1024)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """(1024, 1024) float32; each row at a scale of its own, none so small that a float16 scale is subnormal."""
    rows = np.ldexp(np.float32(1), np.arange(1024) % 12 - 1).astype(np.float32)[:, None]
    return torch.from_numpy(integers(SHAPE, 7) * rows)


def ours(x: torch.Tensor, **kwargs: object) -> QTensor:
    spec = QuantSpec(**kwargs)
    return quantize(x, choose_qparams(x, spec), spec)


# --- ggml: byte for byte -------------------------------------------------------------------------------------------

GGML = {"block": (1, 32), "divide": "exact_inverse", "scale": "float16"}


def bits16(t: torch.Tensor) -> np.ndarray:
    """Stored float16 (R, B) -> little-endian bytes (R, B, 2)."""
    return t.numpy().view(np.uint8).reshape(*t.shape, 2)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes (R, B, 32) -> bytes (R, B, 16): element j in the low nibble, j + 16 in the high one."""
    low = codes & 15
    return (low[..., :16] | (low[..., 16:] << 4)).astype(np.uint8)


def blocks(q: QTensor, shift: int = 0) -> np.ndarray:
    return (tile(q.codes, (1, 32)).numpy().astype(np.int64) + shift)[:, :, 0, :]


def encode(name: str, x: torch.Tensor) -> np.ndarray:
    """A ggml tensor (R, bytes) from our codes and scales."""
    if name == "Q8_0":
        q = ours(x, qtype="int8", rounding="half_away", **GGML)
        parts = [bits16(q.scale), blocks(q).astype(np.int8).view(np.uint8)]
    elif name == "Q4_1":
        q = ours(x, qtype="uint4", range="minmax", offset="float16", rounding="half_up", **GGML)
        parts = [bits16(q.scale), bits16(q.offset), nibbles(blocks(q))]
    elif name == "Q4_0":
        q = ours(x, qtype="int4", range="signed_max", rounding="half_up", **GGML)
        parts = [bits16(q.scale), nibbles(blocks(q, 8))]
    else:
        q = ours(x, qtype="int5", range="signed_max", rounding="half_up", **GGML)
        codes = blocks(q, 16)
        high = np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little")
        parts = [bits16(q.scale), high, nibbles(codes)]
    return np.concatenate(parts, -1).reshape(x.shape[0], -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_ggml_bytes(name: str, x: torch.Tensor) -> None:
    want = quants.quantize(x.numpy(), GGMLQuantizationType[name])
    got = encode(name, x)
    assert got.shape == want.shape
    assert np.flatnonzero((got != want).any(-1)).tolist() == []


# --- compressed-tensors --------------------------------------------------------------------------------------------


def compressed(x: torch.Tensor, bits: int, symmetric: bool, group: int | None) -> tuple[torch.Tensor, ...]:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as theirs
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    t = x.reshape(x.shape[0], -1, group or x.shape[1])
    scale, zero = calculate_qparams(t.amin(-1), t.amax(-1), args)
    return theirs(x, scale, zero, args, dtype=torch.int8), scale, zero


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 128), (8, None), (3, 64)])
def test_compressed_tensors_symmetric(bits: int, group: int | None, x: torch.Tensor) -> None:
    codes, scale, _ = compressed(x, bits, True, group)
    q = ours(x, qtype=f"int{bits}", block=(1, group or -1), range="absmax_half", scale="float32")
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.codes, codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_asymmetric(bits: int, x: torch.Tensor) -> None:
    """They add the zero point before rounding, so a quotient at a tie goes to the even sum; all else is equal."""
    codes, scale, zero = compressed(x, bits, False, 32)
    q = ours(x, qtype=f"int{bits}", block=(1, 32), range="minmax", offset="zero_point", scale="float32")
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.offset, zero.to(torch.int32))
    different = q.codes != codes
    assert different.float().mean() < 1e-3
    quotient = (tile(x, (1, 32)).double() / scale.double()[..., None, None]).reshape(SHAPE)[different]
    assert ((quotient - quotient.floor() - 0.5).abs() < 2**-14).all()


# --- torchao -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchao() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization.quant_primitives")


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, True), (8, 1024, True), (2, 64, True), (4, 32, False)]
)
def test_torchao(bits: int, group: int, symmetric: int, x: torch.Tensor, torchao: ModuleType) -> None:
    mapping = torchao.MappingType.SYMMETRIC if symmetric else torchao.MappingType.ASYMMETRIC
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    block = (1, group)
    scale, zero = torchao.choose_qparams_affine(x, mapping, block, torch.int8, low, high, scale_dtype=torch.float32)
    codes = torchao.quantize_affine(x, block, scale, zero, torch.int8, low, high)
    rule = {"range": "absmax_half"} if symmetric else {"range": "minmax", "offset": "zero_point"}
    q = ours(x, qtype=f"int{bits}", block=block, divide="stored_inverse", scale="float32", **rule)
    assert torch.equal(q.scale, scale.view_as(q.scale))
    if not symmetric:
        assert torch.equal(q.offset, zero.view_as(q.offset).to(torch.int32))
    assert torch.equal(q.codes, codes)


# --- MLX: its formula in float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mlx_formula(bits: int, x: torch.Tensor) -> None:
    """Codes may differ from exact arithmetic only where a quotient is within float32's error of a tie."""
    q = ours(x, qtype=f"uint{bits}", block=(1, 64), range="mlx", offset="float32", scale="float32", divide="exact")
    t = tile(x, (1, 64)).double()[:, :, 0]
    low, high, n = t.amin(-1), t.amax(-1), 2**bits - 1
    scale = ((high - low) / n).clamp(min=1e-7)
    edge = torch.where(high.abs() >= low.abs(), high, low)
    scale = torch.where(high.abs() >= low.abs(), -scale, scale)
    q0 = (edge / scale).round()
    scale = torch.where(q0 == 0, scale, edge / q0)
    bias = torch.where(q0 == 0, 0.0, edge)
    same = (q.scale.double() / scale - 1).abs() < 2**-20  # elsewhere edge / scale was at a tie itself
    assert same.float().mean() > 0.999
    assert torch.equal(q.offset.double()[same], bias[same])
    quotient = (t - bias[..., None]) / scale[..., None]
    different = (quotient.round().clamp(0, n) != tile(q.codes, (1, 64))[:, :, 0]) & same[..., None]
    assert ((quotient - quotient.floor() - 0.5).abs()[different] < 1e-4).all()
