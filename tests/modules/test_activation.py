"""Activations of the runtimes' kernels: equal to ggml's and ONNX Runtime's own, bit for bit; training is torch's."""

import copy
import math

import ggml_library
import numpy as np
import pytest
import torch
from tiny_text_models import tiny
from torch import Tensor
from transformers.activations import NewGELUActivation

from qat.modules.activation import (
    KernelActivation,
    ggml_silu,
    onnxruntime_gelu_tanh,
    onnxruntime_silu,
    use_kernel_activations,
)

X = np.random.default_rng(0).normal(0, 4, (1024, 1024)).astype(np.float32)
WIDE = np.concatenate([np.linspace(-200, 200, 4000), [-3e38, -1e20, 1e20, 3e38]]).astype(np.float32)[None]


def same(found: np.ndarray, want: np.ndarray) -> None:
    """Bit for bit on AVX2; wider vectors, which were not at hand, may have other kernels."""
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        np.testing.assert_array_equal(found, want)
    else:
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def in_onnxruntime(nodes: list[tuple[str, list[str]]], x: np.ndarray, **attributes: str) -> np.ndarray:
    """The last of these nodes (kind, inputs), each of which makes a tensor of its kind's name."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    made = [onnx.helper.make_node(kind, inputs, [kind], **attributes) for kind, inputs in nodes]
    ends = [onnx.helper.make_tensor_value_info(n, 1, x.shape) for n in ("x", nodes[-1][0])]
    graph = onnx.helper.make_graph(made, "activation", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("x", [X, WIDE], ids=["normal", "wide"])
def test_onnxruntimes_activations(x: np.ndarray) -> None:
    silu = in_onnxruntime([("Sigmoid", ["x"]), ("Mul", ["x", "Sigmoid"])], x)
    same(onnxruntime_silu(torch.from_numpy(x)).numpy(), silu)
    gelu = in_onnxruntime([("Gelu", ["x"])], x, approximate="tanh")
    same(onnxruntime_gelu_tanh(torch.from_numpy(x)).numpy(), gelu)


@pytest.mark.parametrize("x", [X, WIDE], ids=["normal", "wide"])
def test_ggmls_silu(x: np.ndarray) -> None:
    want, got = ggml_library.unary("ggml_silu", x), ggml_silu(torch.from_numpy(x)).numpy()
    same(got, want)


@pytest.mark.parametrize(
    ("kind", "kernel", "count"), [("llama", "ggml", 2), ("gpt2", "ggml", 0), ("gpt2", "onnxruntime", 2)]
)
def test_a_model_changes_in_its_last_bits_alone(kind: str, kernel: str, count: int) -> None:
    model = tiny(kind)
    ids, other = torch.arange(3, 15)[None], copy.deepcopy(model).eval()
    assert use_kernel_activations(other, kernel) == count
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_training_is_torchs_and_dtypes_are_kept() -> None:
    x = torch.linspace(-12, 12, 1001, requires_grad=True)
    act = KernelActivation("transformers.activations.NewGELUActivation", "onnxruntime")

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y.sum(), x)[0]

    torch.testing.assert_close(gradient(act.train()(x)), gradient(NewGELUActivation()(x)), rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        assert act.eval()(x.bfloat16()).dtype is torch.bfloat16
        assert act(torch.tensor([0.0, 1.0]))[1].item() == pytest.approx(
            0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=1e-3
        )
