"""Observers against numpy, scipy, torch.ao, onnxruntime and exhaustive search."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy as scipy_entropy

from qat.affine import qparams_from_range
from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.errors import UserError
from qat.fake_quantize import fake_quantize
from qat.observers.ema import EMAObserver
from qat.observers.entropy import EntropyObserver, kl_divergences
from qat.observers.histogram import Histogram
from qat.observers.minmax import MinMaxObserver
from qat.observers.mse import MSEObserver, expected_error
from qat.observers.percentile import PercentileObserver
from qat.quantizers.observed import Observed
from qat.scheme import QuantSpec, Rule, Scheme

TENSOR = (-1, -1)
SYMMETRIC = QuantSpec(qtype="int8", block=TENSOR, scale="float32")
INT4 = QuantSpec(qtype="int4", block=TENSOR, scale="float32")
ZERO_POINT = QuantSpec(qtype="uint8", block=TENSOR, range="minmax", scale="float32", offset="zero_point")
UINT4 = QuantSpec(qtype="uint4", block=TENSOR, range="minmax", scale="float32", offset="zero_point")
FLOATING = QuantSpec(qtype="uint8", block=TENSOR, range="minmax", scale="float32", offset="float32")
ALL = [MinMaxObserver, EMAObserver, Histogram, PercentileObserver, MSEObserver, EntropyObserver]


def stream(seed: int = 0, n: int = 20_000, tail: float = 3.0) -> torch.Tensor:
    """Student's t: heavy tails, so that clipping pays."""
    return torch.tensor(np.random.default_rng(seed).standard_t(tail, n), dtype=torch.float32)


def seen(observer, x: torch.Tensor, batches: int = 1):
    for part in x.chunk(batches):
        observer.update(part)
    return observer


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.integers(2, 60), elements=finite)


@settings(max_examples=150, deadline=None)
@given(arrays, st.integers(0, 59), st.sampled_from([2, 3, 16, 2048]))
def test_histogram_of_a_stream_is_that_of_all_values_at_once(values, cut, bins):
    x = torch.from_numpy(values)
    cut = min(cut, len(x) - 1)
    whole, parts = Histogram(bins=bins), Histogram(bins=bins)
    whole.update(x)
    parts.update(x[cut:])
    if cut:
        parts.update(x[:cut])
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    k, n = whole.filled()
    edges = np.ldexp(k.numpy().astype(np.float64), int(whole.exponent))
    want = [((values >= e) & (values < e + whole.width)).sum() for e in edges]
    assert n.tolist() == want
    assert n.sum() == len(values)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.floats(-3, 3))
def test_at_least_half_of_the_bins_are_used(seed, scale, shift):
    h = seen(Histogram(bins=256), stream(seed, 500) * scale + shift * scale)
    assert float(h.high - h.low) / h.width > 126


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0, 75.0])
@pytest.mark.parametrize("spec", [SYMMETRIC, ZERO_POINT])
def test_percentile_is_numpys_to_one_bin(percentile, spec):
    x = stream(1)
    observer = seen(PercentileObserver(percentile=percentile), x, 7)
    low, high = observer.range(spec)
    if spec.offset is None:
        want = np.percentile(x.abs().numpy().astype(np.float64), percentile)
        assert abs(float(torch.maximum(high, -low)) - want) <= observer.width
    else:
        want = np.percentile(x.numpy().astype(np.float64), [(100 - percentile) / 2, 50 + percentile / 2])
        assert np.abs(np.array([float(low), float(high)]) - want).max() <= observer.width
    if percentile == 100:
        assert torch.maximum(high, -low) == x.abs().max()


def test_percentile_of_a_rarely_active_layer_is_not_empty():
    x = torch.zeros(100_000)
    x[:3] = torch.tensor([1.0, 2.0, 3.0])
    for spec in (SYMMETRIC, ZERO_POINT):
        assert seen(PercentileObserver(percentile=99.9), x).range(spec) == (0.0, 3.0)


def test_moving_average_is_torch_aos():
    from torch.ao.quantization import MovingAverageMinMaxObserver

    ours, theirs = EMAObserver(momentum=0.1), MovingAverageMinMaxObserver(averaging_constant=0.1)
    for seed in range(5):
        x = stream(seed, 100)
        ours.update(x)
        theirs(x)
    assert torch.equal(ours.low, theirs.min_val)
    assert torch.equal(ours.high, theirs.max_val)


def test_minmax_is_torch_aos():
    from torch.ao.quantization import MinMaxObserver as Theirs

    ours, theirs = MinMaxObserver(), Theirs()
    for seed in range(3):
        ours.update(stream(seed, 100))
        theirs(stream(seed, 100))
    assert (ours.low, ours.high) == (theirs.min_val, theirs.max_val)


def true_error(x: torch.Tensor, low, high, spec: QuantSpec) -> float:
    q = qparams_from_range(torch.as_tensor(low).reshape(1, 1), torch.as_tensor(high).reshape(1, 1), spec)
    return float((fake_quantize(x[None], q, spec) - x[None]).double().square().mean())


@pytest.mark.parametrize("spec", [SYMMETRIC, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("tail", [2.5, 4.0, 30.0])
def test_mse_finds_the_best_threshold_of_an_exhaustive_search(spec, tail):
    x = stream(3, 20_000, tail)
    low, high = seen(MSEObserver(), x, 5).range(spec)
    best = min(true_error(x, -t, t, spec) for t in torch.linspace(0, float(x.abs().max()), 800)[1:])
    assert true_error(x, low, high, spec) <= 1.01 * best
    if spec is INT4:  # clipping pays, and it is found
        assert true_error(x, low, high, spec) < 0.7 * true_error(x, x.min(), x.max(), spec)


@pytest.mark.parametrize("spec", [UINT4, FLOATING], ids=["zero_point", "floating"])
@pytest.mark.parametrize("name", ["two tails", "relu", "lopsided"])
def test_mse_comes_close_to_an_exhaustive_search_of_both_ends(spec, name):
    x = stream(4, 8000)
    x = {"two tails": x, "relu": x.relu(), "lopsided": torch.where(x > 0, 8 * x, 0.3 * x)}[name]
    low, high = seen(MSEObserver(), x, 3).range(spec)
    h = seen(Histogram(), x)
    k, n = h.filled()
    centres = ((k + 0.5) * h.width).float()
    a, b = float(x.min()), float(x.max())
    grid = torch.cartesian_prod(torch.linspace(a, min(a * 0.02, 0), 40), torch.linspace(b * 0.02, b, 80))
    best = min(float(expected_error(centres, n, *part.unbind(1), spec).min()) for part in grid.split(256))
    found = float(expected_error(centres, n, low[None], high[None], spec)[0])
    assert found <= 1.02 * best


@settings(max_examples=40, deadline=None)
@given(arrays.filter(lambda a: np.abs(a).max() < 1e30), st.sampled_from([SYMMETRIC, INT4, ZERO_POINT, FLOATING]))
def test_mse_is_never_worse_than_minmax(values, spec):
    observer = seen(MSEObserver(), torch.from_numpy(values))
    low, high = observer.range(spec)
    k, n = observer.filled()
    x = ((k + 0.5) * observer.width).float().clamp(observer.low, observer.high)
    found, minmax = (
        expected_error(x, n, a[None], b[None], spec)[0] for a, b in ((low, high), (observer.low, observer.high))
    )
    assert found <= minmax


def naive_kl(counts: np.ndarray, i: int, levels: int) -> float:
    """TensorRT's recipe step by step, with scipy's relative entropy."""
    p = counts[:i].astype(np.float64)
    raw = p.copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    for j in range(levels):
        a, b = i * j // levels, i * (j + 1) // levels
        filled = raw[a:b] > 0
        if filled.any():
            q[a:b][filled] = raw[a:b].sum() / filled.sum()
    return float(scipy_entropy(p, q))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, st.integers(8, 80), elements=st.integers(0, 50)), st.sampled_from([2, 4, 8]))
def test_kl_from_prefix_sums_is_scipys(counts, levels):
    counts[-1] += 1
    got = kl_divergences(torch.from_numpy(counts), levels).numpy()
    with np.errstate(all="ignore"):
        want = np.array(
            [naive_kl(counts, i, levels) if counts[:i].any() else np.inf for i in range(levels, len(counts) + 1)]
        )
    some = np.array([counts[:i].any() for i in range(levels, len(counts) + 1)])
    np.testing.assert_allclose(got[some], want[some], atol=1e-10)


def test_entropy_clips_where_onnxruntimes_calibrator_does():
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = stream(5, 60_000)
    ours = float(seen(EntropyObserver(bins=1024), x, 4).range(SYMMETRIC)[1])
    top = float(x.abs().max())
    counts, edges = np.histogram(x.numpy(), bins=511, range=(-top, top))
    collector = HistogramCollector("entropy", True, 511, 255, 99.99, "same")
    theirs = float(collector.get_entropy_threshold((counts, edges, -top, top, top), 255)[1])
    assert ours < 0.5 * top  # both clip hard
    assert theirs < 0.7 * top


@pytest.mark.parametrize("spec", [INT4, UINT4])
def test_a_clipping_observer_beats_minmax_on_heavy_tails(spec):
    x = stream(6, 50_000, 2.5)
    whole = true_error(x, x.min(), x.max(), spec)
    assert true_error(x, *seen(MSEObserver(), x, 5).range(spec), spec) < 0.5 * whole


@pytest.mark.parametrize("observer", ALL)
@pytest.mark.parametrize("spec", [SYMMETRIC, ZERO_POINT], ids=["symmetric", "zero_point"])
def test_a_dead_layer_gets_scale_one_and_zeros(observer, spec):
    q = Observed(spec, observer)
    q.calibrating = True
    q(torch.zeros(4, 8))
    q.calibrating = False
    assert q.scale.item() == 1
    assert torch.equal(q(torch.zeros(4, 8)), torch.zeros(4, 8))


@pytest.mark.parametrize("observer", ALL)
def test_save_and_load_in_mid_stream_continues_bit_for_bit(observer):
    batches = list(stream(7, 2000).reshape(10, 10, 20) * torch.logspace(-2, 1, 10)[:, None, None])
    straight, first, second = (Observed(ZERO_POINT, observer) for _ in range(3))
    for b in batches:
        straight(b)
    for b in batches[:5]:
        first(b)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for b in batches[5:]:
        second(b)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert torch.equal(straight(batches[0]), second(batches[0]))


def tiny() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    weight = QuantSpec(qtype="int8", scale="float32")
    return prepare(model, [Rule(scheme=Scheme(weight=weight, input=ZERO_POINT, static=True))], observer=MSEObserver)


def test_calibration_reports_nan_empty_sets_and_use_before_it():
    model = tiny()
    run = lambda m, b: m(b)  # noqa: E731
    with pytest.raises(UserError, match="empty"):
        calibrate(model, [], run)
    with pytest.raises(UserError, match="before any batch"):
        model.eval()(torch.ones(2, 8))
    with pytest.raises(UserError, match="NaN"):
        calibrate(model, [torch.full((2, 8), torch.nan)], run)
    with pytest.raises(UserError, match="calibrate"):
        freeze_observers(tiny())


def test_frozen_ranges_do_not_move_and_active_ones_do():
    model = tiny()
    calibrate(model, [torch.rand(4, 8) for _ in range(3)], lambda m, b: m(b))
    before = convert(model).inputs["0"].scale
    model.train()
    model(10 * torch.rand(4, 8))
    moved = convert(model).inputs["0"].scale
    assert moved > 5 * before
    freeze_observers(model)
    model(100 * torch.rand(4, 8))
    assert torch.equal(convert(model).inputs["0"].scale, moved)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EMAObserver(momentum=0.0),
        lambda: PercentileObserver(percentile=0.5),
        lambda: Histogram(bins=1),
        lambda: EntropyObserver(bins=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(UserError):
        make()
