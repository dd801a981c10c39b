"""Bytes of ggml's blocks against the gguf package's own quantizer and decoder."""

from dataclasses import replace

import ggml_library
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qat.affine import QTensor, choose_qparams, dequantize, quantize
from qat.errors import UserError
from qat.exporters.gguf_blocks import TYPES, BlockType, refuse_grid
from qat.exporters.gguf_k import SUPER, factors
from qat.fake_quantize import fake_quantize
from qat.scheme import QuantSpec, bits_per_weight

IDS = [t.ggml.name for t in TYPES]


def weights(rows: int = 64, cols: int = 1024) -> Tensor:
    torch.manual_seed(0)
    w = torch.randn(rows, cols) * 0.05
    w[3] = 0
    w[4, :300] = 0
    w[5] = w[5].abs()
    w[6] = -w[6].abs()
    w[7] *= 1e-4
    w[8, 32:64] = 0.25  # a constant block
    return w


def frozen(t: BlockType, w: Tensor) -> QTensor:
    return quantize(w, choose_qparams(w, t.spec), t.spec)


@pytest.mark.parametrize("t", TYPES, ids=IDS)
def test_the_package_decodes_our_bytes_to_our_values(t: BlockType) -> None:
    q = frozen(t, weights())
    data = t.pack(q)
    theirs = torch.from_numpy(quants.dequantize(data, t.ggml))
    assert torch.equal(theirs, dequantize(q))
    assert torch.equal(fake_quantize(weights(), choose_qparams(weights(), t.spec), t.spec), dequantize(q))
    assert data.nbytes * 8 / q.codes.numel() == bits_per_weight(t.spec, (64, 1024))


@pytest.mark.parametrize("t", TYPES, ids=IDS)
def test_any_codes_and_scales_survive(t: BlockType) -> None:
    """Every code with every position, scales of both signs: the decoder of the package, and ours, give them back."""
    torch.manual_seed(1)
    q = frozen(t, weights())
    q = replace(q, codes=torch.randint(t.spec.type.qmin, t.spec.type.qmax + 1, q.codes.shape, dtype=q.codes.dtype))
    if isinstance(t.spec.scale, str):
        q = replace(q, scale=(torch.randn(q.scale.shape) * 0.1).half())
    data = t.pack(q)
    assert torch.equal(torch.from_numpy(quants.dequantize(data, t.ggml)), dequantize(q))
    codes, scale, offset = t.unpack(data)
    assert torch.equal(codes, q.codes)
    assert codes.dtype == q.codes.dtype
    assert torch.equal(scale, q.scale)
    assert scale.dtype == q.scale.dtype
    assert (offset is None) == (q.offset is None)
    if offset is not None and q.offset is not None:
        assert torch.equal(offset, q.offset)


RULES = {
    "Q4_0": {"range": "signed_max", "rounding": "half_up"},
    "Q4_1": {"rounding": "half_up"},
    "Q5_0": {"range": "signed_max", "rounding": "half_up"},
    "Q8_0": {"rounding": "half_away"},
    "TQ2_0": {"rounding": "half_away"},
}


@pytest.mark.parametrize("name", RULES)
def test_ggmls_own_rule_gives_the_bytes_of_its_quantizer(name: str) -> None:
    t = next(t for t in TYPES if t.ggml.name == name)
    spec = replace(t.spec, divide="exact_inverse", **RULES[name])
    w = weights()
    w = torch.cat([w[:3], w[5:7], w[9:]])  # our zero-block rule and smallest scale are not ggml's
    ours = t.pack(quantize(w, choose_qparams(w, spec), spec))
    np.testing.assert_array_equal(ours, quants.quantize(w.numpy(), t.ggml))


def test_q4_k_serves_better_than_one_level_of_the_same_size() -> None:
    """4.5 bits in all against int4 with a float16 scale for each 32 (4.5 bits): less error on skewed weights."""
    torch.manual_seed(2)
    w = torch.randn(64, 1024) * 0.05 + torch.randn(64, 32).repeat_interleave(32, 1) * 0.05
    error = {}
    for t in TYPES:
        error[t.ggml] = float((dequantize(frozen(t, w)) - w).square().mean())
    assert error[GGMLQuantizationType.Q4_K] < error[GGMLQuantizationType.Q4_0]


@given(st.lists(st.integers(0, 63), min_size=8, max_size=8), st.integers(1, 0x7BFF), st.booleans())
def test_factors_are_found_for_every_product(codes: list[int], bits: int, negative: bool) -> None:
    factor = torch.tensor([bits], dtype=torch.int16).view(torch.float16).float() * (-1 if negative else 1)
    values = (torch.tensor(codes, dtype=torch.float32) * factor).unsqueeze(0)
    got, d = factors(values, SUPER)
    assert torch.equal(got.float() * d.float().repeat_interleave(8, 1), values)


def test_a_single_level_of_scales_is_refused() -> None:
    with pytest.raises(UserError, match="scales 8 to 15 of row 1"):
        factors(torch.cat([torch.ones(2, 8), torch.stack([torch.ones(8), torch.rand(8)])], 1), SUPER)


def test_super_scales_are_never_zero_and_blocks_of_zeros_do_not_raise_their_neighbours() -> None:
    spec = next(t for t in TYPES if t.ggml.name == "Q4_K").spec
    w = weights()
    w[9, :32] = 0
    grid = choose_qparams(w, spec)
    assert (grid.scale > 0).all()
    assert grid.scale[9, 0] <= grid.scale[9, 1:8].min()
    assert (dequantize(quantize(w, grid, spec))[9, :32] == 0).all()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (QuantSpec(qtype="int4", block=(1, 64)), r"block is \(1, 64\); the nearest GGUF grid is Q4_0"),
        (QuantSpec(qtype="int3", block=(1, 32)), r"codes are int3; the nearest GGUF grid is Q4_0"),
        (QuantSpec(qtype="ternary", block=(1, 32)), r"block is \(1, 32\); the nearest GGUF grid is TQ2_0"),
        (QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"), r"zero_point.*Q4_1"),
        (QuantSpec(qtype="int8", block=(1, 32), scale="float32"), r"scales are float32; .*Q8_0"),
        (QuantSpec(qtype="uint4", block=(1, 32), range="minmax_zero", scale=SUPER, offset="float16"), "Q4_"),
    ],
)
def test_a_grid_that_no_type_holds_is_refused_with_the_nearest(spec: QuantSpec, says: str) -> None:
    import re

    assert re.search(says, refuse_grid(spec) or "")


@pytest.mark.parametrize("t", TYPES, ids=IDS)
def test_what_ggml_itself_quantized_is_read_and_written_again(t: BlockType) -> None:
    """A million weights through ggml's C code: our values are what it reads, and our bytes are the ones it wrote."""
    torch.manual_seed(3)
    x = (torch.randn(1024, 1024) * torch.rand(1024, 1) * 0.1).numpy()
    x[5, :300] = 0
    data = ggml_library.quantize(x, t.ggml)
    q = QTensor(*t.unpack(data), t.spec)
    np.testing.assert_array_equal(dequantize(q).numpy(), ggml_library.dequantize(data, t.ggml, 1024))
    again = t.pack(q)
    np.testing.assert_array_equal(ggml_library.dequantize(again, t.ggml, 1024), dequantize(q).numpy())
    np.testing.assert_array_equal(np.delete(again, 5, 0), np.delete(data, 5, 0))  # a block of zeros has many factors
