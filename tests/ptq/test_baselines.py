"""Round-to-nearest, truncation and the clip search: against brute force, and through prepare and convert."""

import pytest
import torch
from torch import nn

from qat.affine import QParams, choose_qparams, qparams_from_range, tile
from qat.conversion import convert
from qat.errors import UserError
from qat.fake_quantize import fake_quantize
from qat.kernels import chunks as chunking
from qat.ptq.mse import search
from qat.ptq.rtn import baselines, quantize_model
from qat.scheme import QuantSpec, Rule, Scheme

SPECS = [
    QuantSpec(qtype="int2", block=(1, 32)),
    QuantSpec(qtype="int4", block=(1, -1), range="signed_max"),
    QuantSpec(qtype="int3", block=(-1, -1), range="absmax_half", scale="float32"),
    QuantSpec(qtype="uint2", block=(8, 16), range="minmax", offset="zero_point"),
    QuantSpec(qtype="uint3", block=(1, 16), range="minmax", offset="float16", divide="exact"),
]


def weight(rows: int = 16, cols: int = 64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, cols, generator=g) * torch.rand(rows, 1, generator=g)


def errors(x: torch.Tensor, qp: QParams, spec: QuantSpec) -> torch.Tensor:
    return tile((fake_quantize(x, qp, spec) - x).square(), spec.block).sum((-1, -2))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label())
def test_search_finds_the_best_of_its_candidates_in_every_block(
    spec: QuantSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "ELEMENTS", 256)
    x = weight()
    found = search(x, spec, lowest=0.4, steps=7)
    t = tile(x, spec.block).flatten(-2)
    low, high = t.amin(-1), t.amax(-1)
    if spec.range == "signed_max":
        low = high = torch.where(high > -low, high, low)
    candidates = []
    for ratio in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        middle = (low + high) / 2 if spec.offset == "float16" else 0.0
        qp = qparams_from_range(middle + (low - middle) * ratio, middle + (high - middle) * ratio, spec)
        candidates.append(errors(x, qp, spec))
    torch.testing.assert_close(errors(x, found, spec), torch.stack(candidates).amin(0), rtol=1e-5, atol=1e-9)
    assert found.scale.dtype == choose_qparams(x, spec).scale.dtype


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.label())
def test_search_beats_round_to_nearest(spec: QuantSpec) -> None:
    x = weight()
    ours, rtn = errors(x, search(x, spec), spec), errors(x, choose_qparams(x, spec), spec)
    assert (ours <= rtn * (1 + 1e-6)).all()
    assert ours.sum() < 0.95 * rtn.sum()


@pytest.mark.parametrize("block", [(-1, -1), (1, -1), (1, 16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_baselines_rank_as_they_must(bits: int, block: tuple[int, int]) -> None:
    """Truncation errs by up to a step, rounding by up to half a step: about four times the squared error."""
    x = weight()
    mse = {n: errors(x, choose_qparams(x, s), s).sum() for n, s in baselines(bits, block).items()}
    assert mse["absmax truncated"] > 1.5 * mse["absmax nearest"]
    assert mse["zero-point truncated"] > 1.5 * mse["zero-point nearest"]


def test_quantize_model_has_fixed_grids_that_convert() -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 64)
    before = model(x)
    spec = QuantSpec(qtype="int8", block=(1, -1))
    with pytest.raises(UserError, match="nothing in this model"):
        quantize_model(model, [Rule(path="missing", scheme=Scheme(weight=spec))])
    quantize_model(model, [Rule(scheme=Scheme(weight=spec))], init=search)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0.05)
    frozen = convert(model)
    assert torch.equal(frozen.state_dict()["0.weight"], model[0].quantized_weight())
    assert torch.equal(frozen.weights["0.weight"].tensor.scale, model[0].weight_quantizer.scale)
    with torch.no_grad():
        model[0].weight.mul_(3)  # the grid stays
    assert torch.equal(convert(model).weights["0.weight"].tensor.scale, frozen.weights["0.weight"].tensor.scale)
