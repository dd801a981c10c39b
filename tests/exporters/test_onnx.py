"""ONNX: integer kernels in real ONNX Runtime, the fake-quantized model's predictions, exact codes read two ways."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.data.digits import Digits
from qat.errors import UserError, VerifyError
from qat.exporters import export, read_any
from qat.exporters.onnx import FILE, read, refuse
from qat.files import sha256
from qat.models.digits_cnn import TrainedDigitsCNN
from qat.models.sequential import describe
from qat.quantizers.bias import round_biases
from qat.runtimes import run
from qat.runtimes.ort import operators, predict
from qat.scheme import QuantSpec, Rule, Scheme

WEIGHT = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
UINT8 = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
INT8 = QuantSpec(qtype="int8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
SYMMETRIC = QuantSpec(qtype="int8", block=(-1, -1), scale="float32")
PORTABLE = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="portable", offset="zero_point")


def quantized(model: nn.Module, batches: list[torch.Tensor], weight=WEIGHT, given=UINT8, type: str = "Conv2d|Linear"):
    rules = [Rule(type=type, scheme=Scheme(weight=weight, input=given, static=given is not None))]
    model.eval()
    prepare(model, rules)
    calibrate(model, batches, lambda m, x: m(x))
    freeze_observers(model)
    round_biases(model)
    return model


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """(images, the fake-quantized model's logits, Frozen, exported folder)."""
    data = Digits(batch_size=64)
    model = TrainedDigitsCNN(seed=0, epochs=3).load(data).model
    x = torch.cat([data.images(split)["x"] for split in ("train", "validation", "test")])
    quantized(model, list(x[:640].split(64)))
    with torch.no_grad():
        logits = model(x)
    frozen = convert(model, config=model.config)
    return x, logits, frozen, export(frozen, "onnx", tmp_path_factory.mktemp("onnx") / "out")


def integer(ops: list[str]) -> bool:
    return not {"Conv", "Gemm", "MatMul", "FusedConv", "DequantizeLinear", "Relu", "MaxPool"} & set(ops)


def test_onnxruntime_runs_integers_and_predicts_what_the_trained_model_does(digits):
    x, logits, _, folder = digits
    answers = run("ort", folder, predict=x, operators="", version="")
    assert answers["version"].startswith("onnxruntime ")
    assert integer(answers["operators"]), answers["operators"]
    assert [op for op in answers["operators"] if op in ("QLinearConv", "QGemm")] == ["QLinearConv"] * 3 + ["QGemm"] * 2
    got = answers["predict"]
    assert (got.argmax(1) == logits.argmax(1)).double().mean() >= 0.999
    apart = (got - logits).abs().amax(1)
    # float sums are rounded, integer sums are not: now and then an activation next to a rounding edge falls elsewhere
    assert apart.median() < 1e-5
    assert (apart > 1e-4).double().mean() < 0.02


def test_onnxs_own_reference_evaluator_reads_the_same_network(digits):
    x, logits, _, folder = digits
    model = onnx.load(str(folder / FILE))
    model.opset_import[0].version = 21  # the evaluator has no older DequantizeLinear; for int8 it is the same
    got = ReferenceEvaluator(model).run(None, {"x": x[:24].numpy()})[0]
    assert np.abs(got - logits[:24].numpy()).max() < 0.1  # float64 sums in places: edges fall elsewhere here too
    assert np.median(np.abs(got - logits[:24].numpy())) < 1e-5


def test_what_is_read_back_is_what_was_frozen(digits):
    _, _, frozen, folder = digits
    back = read(folder)
    assert back.digests() == frozen.digests()
    assert back.config == frozen.config
    assert {n: (w.kind, w.shape) for n, w in back.weights.items()} == {
        n: (w.kind, w.shape) for n, w in frozen.weights.items()
    }


def test_initializers_hold_the_codes_seen_by_plain_numpy(digits):
    _, _, frozen, folder = digits
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / FILE)).graph.initializer}
    for name, w in frozen.weights.items():
        assert held[name].dtype == np.int8
        assert np.array_equal(held[name].reshape(len(held[name]), -1), w.tensor.codes.numpy())
        assert np.array_equal(held[f"{name}.scale"], w.tensor.scale.numpy()[:, 0])
        module = name.rpartition(".")[0]
        step = held[f"{module}.input.scale"] * held[f"{name}.scale"]
        assert held[f"{module}.bias"].dtype == np.int32
        assert np.array_equal(held[f"{module}.bias"].astype(np.float32) * step, frozen.floats[f"{module}.bias"].numpy())


def test_exporting_twice_writes_the_same_bytes(digits, tmp_path):
    _, _, frozen, folder = digits
    assert sha256(export(frozen, "onnx", tmp_path / "again") / FILE) == sha256(folder / FILE)


def cnn() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Flatten()),
        nn.Linear(8 * 25, 12),
        nn.Linear(12, 5),
    )


@pytest.mark.parametrize("given", [UINT8, INT8, SYMMETRIC, PORTABLE], ids=["uint8", "int8", "symmetric", "portable"])
@pytest.mark.parametrize("block", [(1, -1), (-1, -1)], ids=["channel", "tensor"])
def test_other_sequential_networks_and_grids_run_as_integers(given, block, tmp_path):
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = QuantSpec(qtype="int8", block=block, scale=given.scale)
    model = quantized(cnn(), [x], weight, given)
    frozen = convert(model, config=describe(model, (3, 8, 8)))
    folder = export(frozen, "onnx", tmp_path / "out")
    assert read(folder).digests() == frozen.digests()
    ops = operators(folder)
    assert sum(op in ("QLinearConv", "QGemm") for op in ops) == 4
    assert not {"Conv", "Gemm", "FusedConv"} & set(ops), ops
    with torch.no_grad():
        apart = (predict(folder, x) - model(x)).abs().amax(1)
    assert apart.median() < 1e-5
    assert (apart > 1e-4).double().mean() < 0.1


def test_layers_left_in_floating_point_stay_exact(tmp_path):
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = quantized(cnn(), [x], type="Conv2d")
    folder = export(convert(model, config=describe(model, (3, 8, 8))), "onnx", tmp_path / "convolutions")
    with torch.no_grad():
        assert (predict(folder, x) - model(x)).abs().median() < 1e-5
    model = quantized(cnn(), [x], given=None)
    frozen = convert(model, config=describe(model, (3, 8, 8)))
    folder = export(frozen, "onnx", tmp_path / "weights")
    assert read(folder).digests() == frozen.digests()
    with torch.no_grad():
        torch.testing.assert_close(predict(folder, x), model(x), atol=1e-5, rtol=1e-5)


def test_a_bias_off_its_grid_is_refused(digits, tmp_path):
    _, _, frozen, _ = digits
    bias = frozen.floats["conv1.bias"]
    broken = type(frozen)(**{**vars(frozen), "floats": {**frozen.floats, "conv1.bias": bias + 1e-5}})
    with pytest.raises(UserError, match=r"conv1\.bias.*round_biases"):
        export(broken, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "spec", "why"),
    [
        ("Conv2d", QuantSpec(qtype="int4", block=(1, -1)), "int8_static"),
        ("Linear", QuantSpec(qtype="int8", block=(1, 32)), "int8_static"),
        ("Embedding", WEIGHT, "Embedding"),
    ],
)
def test_grids_that_integer_kernels_do_not_take_are_refused(kind, spec, why):
    config = {"layers": [{"name": "a", "kind": kind}]}
    assert why in str(refuse("a.weight", kind, (8, 64), spec, config))
    assert refuse("a.weight", kind, (8, 64), None, config) is None
    assert "hf" in str(refuse("a.weight", kind, (8, 64), spec, {"model_type": "bloom"}))


def test_an_input_grid_that_the_runtime_would_round_otherwise_is_refused(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    odd = QuantSpec(**{**UINT8.to_dict(), "rounding": "half_away"})
    model = quantized(cnn(), [x], given=odd)
    with pytest.raises(UserError, match="half to even"):
        export(convert(model, config=describe(model, (3, 8, 8))), "onnx", tmp_path / "out")


def test_unsupported_layers_are_named():
    with pytest.raises(UserError, match="1 is a AvgPool2d"):
        describe(nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2)), (1, 8, 8))


@pytest.mark.parametrize("what", ["code", "scale", "axis", "zero_point", "metadata", "truncated", "wiring"])
def test_damage_is_seen(digits, tmp_path, what):
    _, _, frozen, folder = digits
    model = onnx.load(str(folder / FILE))
    held = {t.name: t for t in model.graph.initializer}

    def change(name: str) -> None:
        array = numpy_helper.to_array(held[name]).copy()
        array.reshape(-1).view(np.uint8)[1] ^= 1
        held[name].CopyFrom(numpy_helper.from_array(array, name))

    nodes = {n.name: n for n in model.graph.node}
    if what in ("code", "scale", "zero_point"):
        change({"code": "conv2.weight", "scale": "conv2.weight.scale", "zero_point": "conv2.weight.zero_point"}[what])
    elif what == "axis":
        nodes["conv2.weight"].attribute[0].i = 1
    elif what == "metadata":
        model.metadata_props[0].value = json.dumps({})
    elif what == "wiring":  # another layer's scales, of the same shape
        nodes["hidden.weight"].input[1] = "conv3.weight.scale"
    content = model.SerializeToString()
    file = Path(tmp_path, FILE)
    file.write_bytes(content[: len(content) // 2] if what == "truncated" else content)
    try:
        back = read_any(file)
    except VerifyError:
        return
    assert what in ("code", "scale", "wiring")
    assert back.digests() != frozen.digests()
