"""Norms of the runtimes' kernels: equal to ggml's and ONNX Runtime's own, bit for bit; names and gradients kept."""

import copy

import ggml_library
import numpy as np
import pytest
import torch
from tiny_text_models import tiny
from torch import nn

from qat.modules.norm import NORMS, KernelLayerNorm, KernelRMSNorm, use_kernel_norms

EPS = 1e-5
KINDS = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2"]
# both libraries take wider sums where there is AVX-512, which was not at hand when this was written
NARROW = torch.backends.cpu.get_cpu_capability() == "AVX2"


def sample(columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are not centred, weights and biases: about a million elements."""
    generator = np.random.default_rng(columns)
    rows = (generator.normal(0.1, 1.3, (2**20 // columns, columns)), generator.normal(1, 0.3, columns))
    return tuple(a.astype(np.float32) for a in (*rows, generator.normal(0, 0.3, columns)))  # pyright: ignore


def ours(kernel: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rms, layer = NORMS[kernel]
    a, w, b = (torch.from_numpy(t) for t in (x, weight, bias))
    return rms(a, w, EPS).numpy(), layer(a, w, b, EPS).numpy()


def same(found: np.ndarray, want: np.ndarray, exact: bool) -> None:
    if exact:
        np.testing.assert_array_equal(found, want)
    else:  # a row's factor may differ in its last bits
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [256, 80, 320, 100, 4096])
def test_ggmls_norms(columns: int) -> None:
    x, w, b = sample(columns)
    rms, layer = ours("ggml", x, w, b)
    same(rms, ggml_library.norm("ggml_rms_norm", x, w, None, EPS), exact=True)
    same(layer, ggml_library.norm("ggml_norm", x, w, b, EPS), exact=NARROW)


def in_onnxruntime(kind: str, x: np.ndarray, parameters: list[np.ndarray]) -> np.ndarray:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    names = ["w", "b"][: len(parameters)]
    node = onnx.helper.make_node(kind, ["x", *names], ["y"], axis=-1, epsilon=EPS)
    given = [onnx.helper.make_tensor_value_info("x", 1, x.shape)]
    made = [onnx.helper.make_tensor_value_info("y", 1, x.shape)]
    held = [onnx.numpy_helper.from_array(p, n) for n, p in zip(names, parameters, strict=True)]
    graph = onnx.helper.make_graph([node], "norm", given, made, held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("columns", [256, 80, 320, 1024])
def test_onnxruntimes_norms(columns: int) -> None:
    x, w, b = sample(columns)
    rms, layer = ours("onnxruntime", x, w, b)
    same(rms, in_onnxruntime("RMSNormalization", x, [w]), exact=NARROW)
    same(layer, in_onnxruntime("LayerNormalization", x, [w, b]), exact=NARROW)


@pytest.mark.parametrize("kernel", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_keeps_its_parameters_and_all_but_the_last_bits(kind: str, kernel: str) -> None:
    model = tiny(kind)
    norms = sum("Norm" in type(m).__name__ for m in model.modules())
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight.add_(0.1 * torch.randn_like(module.weight))  # pyright: ignore
    names, ids = list(model.state_dict()), torch.arange(3, 15)[None]
    other = copy.deepcopy(model).eval()
    assert use_kernel_norms(other, kernel) == norms
    assert list(other.state_dict()) == names
    with torch.no_grad():
        want, got = model.eval()(ids).logits, other(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for net in (model.train(), other.train()):
        torch.manual_seed(0)
        net.zero_grad()
        net.config.use_cache = False
        net(ids, labels=ids).loss.backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_dtypes_are_kept_and_the_arithmetic_is_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    norm = KernelLayerNorm(nn.LayerNorm(64), "ggml").eval()
    assert norm(x.bfloat16()).dtype is torch.bfloat16
    assert torch.equal(copy.deepcopy(norm).double()(x.double()), norm(x).double())


def test_what_is_no_norm_of_a_kernel_stays() -> None:
    model = nn.Sequential(nn.LayerNorm(8, bias=False), nn.LayerNorm((2, 8)), nn.LayerNorm(8, elementwise_affine=False))
    assert use_kernel_norms(model, "ggml") == 0
    assert not any(isinstance(m, KernelLayerNorm | KernelRMSNorm) for m in model)
