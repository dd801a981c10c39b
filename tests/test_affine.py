"""The arithmetic against an oracle in numpy (tests/reference.py): every spec, and the edges."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BLOCKS, integers, valid_specs
from reference import quantize as oracle

from qat.affine import (
    block_range,
    choose_qparams,
    dequantize,
    qparams_from_range,
    quantize,
    round_,
    store_scale,
    tile,
    untile,
)
from qat.fake_quantize import fake_quantize
from qat.scheme import ROUNDINGS, STORED, QuantSpec

SPECS = valid_specs()
SHAPE = (8, 32)
FLAVOURS = ("normal", "zeros", "zero rows", "ties", "tiny", "subnormal", "large", "constant", "positive", "negative")


def make(flavour: str, seed: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Inputs that look for trouble: float32 (R, C)."""
    x = integers(shape, seed)
    if flavour == "zeros":
        return np.zeros(shape, np.float32)
    if flavour == "zero rows":
        x[:: 1 + seed % 3] = 0
    if flavour == "ties":  # multiples of half a step, for the scales that are powers of two
        x = np.rint(x * 64) / 8
        x[:, ::8] = np.where(seed % 2, 8, -7)
    if flavour == "tiny":
        x = x * np.float32(1e-7)
    if flavour == "subnormal":
        x = x * np.float32(1e-41)
    if flavour == "large":
        x = x * np.float32(2e4)
    if flavour == "constant":
        x = np.full(shape, x.flat[0], np.float32)
    if flavour in ("positive", "negative"):
        x = np.abs(x) * (1 if flavour == "positive" else -1)
    return np.ascontiguousarray(x, np.float32)


def check(spec: QuantSpec, x: np.ndarray) -> None:
    """Codes, scales, offsets and values equal the oracle's; the fake-quant forward equals dequantize(quantize(x))."""
    t = torch.from_numpy(x)
    codes, scale, offset, values = oracle(x, spec)
    q = quantize(t, choose_qparams(t, spec), spec)
    assert q.codes.dtype == spec.type.storage
    assert q.scale.dtype == STORED[spec.scale]
    assert np.array_equal(q.scale.float().numpy(), scale)
    assert np.array_equal(q.codes.numpy(), codes)
    if offset is not None:
        assert np.array_equal(q.offset.float().numpy(), offset)
    assert np.array_equal(dequantize(q).numpy(), values)
    assert torch.equal(fake_quantize(t, choose_qparams(t, spec), spec), dequantize(q))
    b = t.to(torch.bfloat16)
    qb = quantize(b, choose_qparams(b, spec), spec)
    fake = fake_quantize(b, choose_qparams(b, spec), spec)
    assert fake.dtype == torch.bfloat16
    assert torch.equal(fake, dequantize(qb, torch.bfloat16))
    assert torch.equal(qb.codes, quantize(b.float(), choose_qparams(b.float(), spec), spec).codes)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(SPECS), st.sampled_from(FLAVOURS), st.integers(0, 1000))
def test_any_spec_equals_the_oracle(spec: QuantSpec, flavour: str, seed: int) -> None:
    check(spec, make(flavour, seed))


@pytest.mark.slow
def test_every_spec_equals_the_oracle() -> None:
    for i, spec in enumerate(SPECS):
        check(spec, make(FLAVOURS[i % len(FLAVOURS)], i))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_roundings_at_every_tie_and_its_neighbours(rounding: str) -> None:
    ties = np.arange(-16, 16, dtype=np.float32) + np.float32(0.5)
    y = np.concatenate([ties, np.nextafter(ties, np.float32(99)), np.nextafter(ties, np.float32(-99))])
    y = np.concatenate([y, np.float32([0.49999997, -0.49999997, 0.0])])
    got = round_(torch.from_numpy(y.copy()), rounding, -8).numpy()
    exact = y.astype(np.float64)
    want = {
        "half_even": np.rint(exact),
        "half_away": np.copysign(np.floor(np.abs(exact) + 0.5), exact),
        "half_up": np.floor((y + np.float32(8.5)).astype(np.float64)) - 8,
        "toward_zero": np.fix(exact),
    }[rounding]
    assert np.array_equal(got, want)


BOUNDED = [s for s in SPECS if s.rounding != "toward_zero" and s.divide.startswith("stored")]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(BOUNDED), st.integers(0, 1000))
def test_error_is_half_a_step_inside_the_grid_and_the_distance_to_it_outside(spec: QuantSpec, seed: int) -> None:
    x = torch.from_numpy(integers(SHAPE, seed))
    qp = choose_qparams(x, spec)
    ends = torch.tensor([spec.type.qmin, spec.type.qmax], dtype=torch.float64)[:, None, None]
    if spec.offset == "zero_point":
        ends = ends - qp.offset
    ends = ends * qp.scale.double()
    if spec.offset not in (None, "zero_point"):
        ends = ends + qp.offset.double()
    low, high = (e[..., None, None] for e in (ends.amin(0), ends.amax(0)))
    t = tile(x, spec.block).double()
    error = (tile(fake_quantize(x, qp, spec), spec.block).double() - t).abs()
    outside = (low - t).clamp(min=0) + (t - high).clamp(min=0)
    step = qp.scale.double().abs()[..., None, None]
    assert (error <= outside + 0.5001 * step).all()


# toward_zero is left out: code * scale / scale may fall an ulp short of the code
IDEMPOTENT = [
    s for s in SPECS if s.offset in (None, "zero_point") and s.divide == "stored" and s.rounding != "toward_zero"
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(IDEMPOTENT), st.integers(0, 99))
def test_the_same_grid_twice_changes_nothing(spec: QuantSpec, seed: int) -> None:
    x = torch.from_numpy(integers(SHAPE, seed))
    qp = choose_qparams(x, spec)
    once = fake_quantize(x, qp, spec)
    assert torch.equal(fake_quantize(once, qp, spec), once)


@pytest.mark.parametrize("block", BLOCKS)
def test_tiles_round_trip(block: tuple[int, int]) -> None:
    x = torch.arange(8 * 32).reshape(8, 32)
    t = tile(x, block)
    assert torch.equal(untile(t), x)
    r, c = (8 if block[0] == -1 else block[0]), (32 if block[1] == -1 else block[1])
    assert t.shape == (8 // r, 32 // c, r, c)
    assert torch.equal(t[-1, -1], x[8 - r :, 32 - c :])
    assert torch.equal(untile(tile(x.t(), (block[1], block[0]))), x.t())


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        choose_qparams(torch.zeros(4, 33), QuantSpec(qtype="int4", block=(1, 32)))


@pytest.mark.parametrize("scale", STORED)
def test_zero_blocks_and_unused_rows(scale: str) -> None:
    x = torch.from_numpy(integers((4, 64), 1))
    x[1] = 0
    x[2, :32] = 0
    q = quantize(x, choose_qparams(x, spec := QuantSpec(qtype="int4", block=(1, 32), scale=scale)), spec)
    assert q.scale[1].tolist() == [1.0, 1.0]
    assert q.scale[2, 0] == 1.0
    assert not q.codes[1].any()
    assert torch.equal(dequantize(q)[1], torch.zeros(64))


@pytest.mark.parametrize("scale", STORED)
def test_stored_scales_are_normal_numbers(scale: str) -> None:
    v = torch.tensor([1e-45, -1e-45, 1e-39, 1e-10, -1e-10, 3e-5, 6.1e-5, 1.0, -65000.0])
    s = store_scale(v, scale)
    assert s.dtype == STORED[scale]
    tiny = torch.finfo(torch.float16 if scale == "portable" else s.dtype).tiny
    assert (s.float().abs() >= tiny).all()
    assert torch.equal(s.float().sign(), v.sign())
    if scale == "portable":
        assert torch.equal(s.to(torch.bfloat16).to(torch.float16), s)


def test_portable_is_exact_in_float16_and_bfloat16_for_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    s = store_scale(every, "portable")
    finite = s[s.isfinite()]
    assert torch.equal(finite.float().to(torch.bfloat16).float(), finite.float())
    assert torch.equal(s.isinf(), every.abs() > 65280)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.ones(2, 32)
    x[1, 3] = bad
    spec = QuantSpec(qtype="int8", block=(1, -1))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(x, choose_qparams(x, spec), spec)
    assert not torch.isfinite(fake_quantize(x, choose_qparams(x, spec), spec)[1]).all()


@pytest.mark.parametrize("scale", ["float16", "portable"])
def test_overflowing_scales_are_refused(scale: str) -> None:
    x = torch.full((1, 32), 3e38)
    spec = QuantSpec(qtype="int4", block=(1, 32), scale=scale)
    with pytest.raises(ValueError, match=f"beyond the range of {scale}"):
        quantize(x, choose_qparams(x, spec), spec)
    wide = QuantSpec(qtype="int4", block=(1, 32), scale="bfloat16")
    assert torch.isfinite(dequantize(quantize(x, choose_qparams(x, wide), wide))).all()


def test_an_overflowing_offset_is_refused() -> None:
    x = torch.tensor([[70000.0, 70001.0]])
    spec = QuantSpec(qtype="uint4", range="minmax", offset="float16")
    with pytest.raises(ValueError, match="offset is beyond"):
        quantize(x, choose_qparams(x, spec), spec)


def test_a_constant_block_with_a_float_offset_is_kept() -> None:
    x = torch.full((1, 8), 0.001)
    spec = QuantSpec(qtype="int8", range="minmax", offset="float16")
    back = dequantize(quantize(x, choose_qparams(x, spec), spec))
    assert torch.allclose(back, x, rtol=2**-11, atol=0)


def test_observed_ranges_give_the_same_grid_as_the_tensor() -> None:
    x = torch.from_numpy(integers(SHAPE, 3))
    for spec in SPECS[::101]:
        for a, b in zip(choose_qparams(x, spec), qparams_from_range(*block_range(x, spec), spec), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


GOLDENS = Path(__file__).with_name("goldens.json")


def golden_digests(spec: QuantSpec) -> dict[str, str]:
    """SHA-256 of the codes, scales and offsets of a million elements, each row at a scale of its own."""
    x = integers((1024, 1024), 42) * np.ldexp(np.float32(1), np.arange(1024) % 23 - 16).astype(np.float32)[:, None]
    t = torch.from_numpy(x)
    q = quantize(t, choose_qparams(t, spec), spec)
    parts = {"codes": q.codes, "scale": q.scale.float(), "offset": q.offset}
    return {k: sha256(v.contiguous().numpy().tobytes()).hexdigest() for k, v in parts.items() if v is not None}


@pytest.mark.parametrize("entry", json.loads(GOLDENS.read_text()) if GOLDENS.exists() else [], ids=lambda e: e["label"])
def test_a_million_elements_equal_the_goldens(entry: dict) -> None:
    assert golden_digests(QuantSpec.from_dict(entry["spec"])) == entry["sha256"]


@given(spec=st.sampled_from(SPECS), wrong=st.sampled_from([np.nan, np.inf, -np.inf]), at=st.integers(0, 255))
@settings(deadline=None, max_examples=500)
def test_a_grid_derived_from_what_is_not_finite_is_not_finite(spec: QuantSpec, wrong: float, at: int) -> None:
    """What `quantize(derived=True)` relies on."""
    x = torch.from_numpy(make("normal", 0))
    x.view(-1)[at] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(x, choose_qparams(x, spec), spec, derived=True)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_codes_of_many_strips_whatever_the_threads_the_gradient_and_the_default_dtype(default: torch.dtype) -> None:
    spec = QuantSpec(qtype="int4", block=(1, 32), range="signed_max")
    x = torch.randn(1100, 1024, requires_grad=True)
    want = torch.cat([quantize(r, choose_qparams(r, spec), spec).codes for r in x.detach().split(100)])
    threads, grid = torch.get_num_threads(), choose_qparams(x, spec)
    try:
        torch.set_default_dtype(default)
        for several in (1, 2):
            torch.set_num_threads(several)
            found = quantize(x, grid, spec)
            assert torch.equal(found.codes, want)
            assert not found.scale.requires_grad
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
