"""The digits, the network trained on them, folding of BatchNorm, and biases on the int32 grid."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from qat.conversion import calibrate, prepare
from qat.data.digits import Digits
from qat.data.stdlib import StdlibData
from qat.errors import UserError
from qat.fold import fold_batchnorm
from qat.models.digits_cnn import DigitsCNN, TrainedDigitsCNN
from qat.quantizers.bias import round_biases
from qat.scheme import QuantSpec, Rule, Scheme

SCHEME = Scheme(
    weight=QuantSpec(qtype="int8", scale="float32"),
    input=QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point"),
    static=True,
)


def test_splits_are_disjoint_whole_and_the_same_for_every_seed():
    data = Digits(batch_size=32, seed=1)
    parts = [data.images(split) for split in ("train", "validation", "test")]
    assert [len(p["labels"]) for p in parts] == [1258, 180, 359]
    rows = torch.cat([p["x"].flatten(1) for p in parts]) * 16
    want = torch.from_numpy(load_digits().data).float()
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.tolist()))
    assert torch.equal(Digits(batch_size=8, seed=2).images("test")["x"], parts[2]["x"])
    assert data.evaluation("test", 10)["labels"].tolist() == parts[2]["labels"][:10].tolist()


def test_training_batches_follow_from_the_seed():
    first, again, other = (next(iter(Digits(batch_size=16, seed=s).train_dataloader())) for s in (5, 5, 6))
    assert first["x"].shape == (16, 1, 8, 8)
    assert first["x"].dtype == torch.float32
    assert first["labels"].dtype == torch.int64
    assert torch.equal(first["x"], again["x"])
    assert not torch.equal(first["x"], other["x"])
    assert sum(len(b["labels"]) for b in Digits(batch_size=16).val_dataloader()) == 180


def test_the_float_model_learns_and_is_the_same_for_the_same_seed():
    data = Digits(batch_size=64)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    source = TrainedDigitsCNN(seed=4, epochs=4)
    model = source.load(data).model
    assert torch.equal(torch.get_rng_state(), state)  # the run's own random numbers are untouched
    test = data.images("test")
    assert (model(test["x"]).argmax(1) == test["labels"]).double().mean() > 0.95
    torch.manual_seed(12)
    again = TrainedDigitsCNN(seed=4, epochs=4).load(data).model
    cached = source.load(data).model
    assert cached is not model
    for other in (again, cached):
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model)


def test_the_model_says_which_data_it_needs():
    with pytest.raises(UserError, match="data=digits"):
        TrainedDigitsCNN(seed=0).load(StdlibData(block_size=8, batch_size=1))


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    model = nn.Sequential(
        DigitsCNN(),
        nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU()),
    )
    for _ in range(20):
        model(torch.randn(32, 1, 8, 8) * 3 + 1)
    x = torch.randn(16, 1, 8, 8)
    want = model.eval()(x)
    torch.testing.assert_close(fold_batchnorm(model)(x), want, atol=1e-5, rtol=1e-5)
    assert model[0].conv1.bias is not None


def test_a_batchnorm_that_cannot_be_folded_is_named():
    with pytest.raises(UserError, match="1"):
        fold_batchnorm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def prepared() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    prepare(model, [Rule(scheme=SCHEME)])
    calibrate(model, [torch.rand(8, 1, 8, 8)], lambda m, x: m(x))
    return model


def test_biases_move_by_at_most_half_a_step_and_only_once():
    model = prepared()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    assert round_biases(model) == 2
    for path in ("0", "3"):
        layer = model.get_submodule(path)
        weight = layer.weight.detach().flatten(1)
        step = layer.input_quantizer.scale.item() * weight.abs().amax(1).double() / 127
        codes = layer.bias.detach().double() / step
        assert ((codes - codes.round()) / codes).abs().max() < 2**-22  # float32 products
        assert codes.abs().max() > 1000
        assert ((layer.bias - before[f"{path}.bias"]).abs() <= 0.5001 * step).all()
        assert not torch.equal(layer.bias, before[f"{path}.bias"])
    once = [p.detach().clone() for p in model.parameters()]
    round_biases(model)
    assert all(torch.equal(a, b) for a, b in zip(once, model.parameters(), strict=True))


def test_a_bias_beyond_its_grid_is_named():
    model = prepared()
    with torch.no_grad():
        model[3].weight[1] *= 1e-12
        model[3].bias[1] = 100.0
    with pytest.raises(UserError, match=r"3\.bias\[1\]"):
        round_biases(model)
