"""The evaluations that a simulation is held against itself with, and the causes that the parity table names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_causes import FORMULA, LAST_BIT, SATURATED, UNSIGNED, as_transformers, cause, known, saturating, unsigned
from parity_spread import moved, others, reordered, spreads, step

import qat

TOKEN = qat.QuantSpec(qtype="int8", divide="reciprocal", scale="float32")


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 32))
    scheme = qat.Scheme(weight=qat.QuantSpec(qtype="int8"), input=TOKEN)
    qat.prepare(layers, [qat.Rule(scheme=scheme)])
    return layers.eval()


def test_every_kind_is_as_valid_and_leaves_nothing_behind() -> None:
    model, x, linear = net(), torch.randn(20, 256), F.linear
    with torch.no_grad():
        want = model(x)
        found = others(model, lambda m: m(x.to(next(m.parameters()).dtype)))
        assert F.linear is linear
        assert torch.equal(model(x), want)
        assert next(model.parameters()).dtype == torch.float32
        largest = float(want.abs().max())
        assert list(spreads(want, found, largest)) == ["float64", "order", "last bit"]
        for other in (x for kind in found.values() for x in kind):
            assert 0 < (other - want).abs().max() < 0.1 * largest


def test_an_order_moves_the_last_bits_and_a_move_is_one_unit() -> None:
    x, w = torch.randn(9, 500), torch.randn(7, 500)
    with reordered(0):
        assert 0 < (F.linear(x, w) - x @ w.t()).abs().max() < 1e-4
    model, x, seen = net(), torch.randn(50, 256), []
    with moved(model, 0), torch.no_grad():
        hook = model[0].register_forward_pre_hook(lambda m, given: seen.append(given[0]))  # after the one that moves
        model(x)
    hook.remove()
    above, below = (torch.nextafter(x, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    for neighbour in (above, below, x):
        assert 0.3 < (seen[0] == neighbour).float().mean() < 0.37


def test_one_step_of_a_log_probability() -> None:
    assert step(torch.tensor([-1.0, -8.5]), 2.0) == 2.0**-21


@pytest.mark.parametrize(
    ("target", "exporter", "missed", "said"),
    [
        ("awq_int4", "awq", "none", ""),
        ("awq_int4", "awq", "**logits**", "float16"),
        ("portable_int4", "gguf", "**logits**, **greedy**", "trains none"),
        ("llama_cpp", "gguf", "**logits**", LAST_BIT),
        ("llama_cpp", "gguf", "**logits**, **perplexity**", "not traced"),
    ],
)
def test_causes(target: str, exporter: str, missed: str, said: str) -> None:
    error = torch.cat([torch.full((20,), 1e-7), torch.full((30,), 1e-3)])
    found = cause(target, exporter, missed, None, error, 2e-3)
    assert said in found
    assert bool(said) == bool(found)
    if said == LAST_BIT:
        assert cause(target, exporter, missed, None, error, 5e-4) == "not traced"
        assert cause(target, exporter, missed, None, error[10:], 2e-3) == "not traced"
        both = cause(target, exporter, "**logits**, **greedy**", None, error, 2e-3, "5 of 64 more")
        assert both == f"{LAST_BIT}; 5 of 64 more"


def test_the_formula_of_transformers_takes_vllms_place() -> None:
    model = net()
    other = as_transformers(model)
    x = torch.tensor([[-1.0, 0.5, 127.0]])
    assert other[0].input_quantizer.qparams(x).scale.item() == pytest.approx(127 / 127.5)  # type: ignore[index]
    assert model[0].input_quantizer.qparams(x).scale.item() == 1.0  # type: ignore[union-attr]


def test_without_vnni_pairs_of_products_saturate() -> None:
    """Weights and inputs at their largest: 255 * 127 + 255 * 127 is kept as 32767, and no sum changes at half of it."""
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=True))
    scheme = qat.Scheme(weight=qat.QuantSpec(qtype="int8", scale="float32"), input=TOKEN)
    qat.prepare(model, [qat.Rule(scheme=scheme)])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[127.0, 127.0, 127.0, 127.0]]))
        model[0].bias.fill_(1.0)
        x = torch.tensor([[[127.0, 127.0, 127.0, 127.0], [127.0, -127.0, -127.0, 127.0]]])
        assert saturating(model)(x).flatten().tolist() == [2 * 32767 - 4 * 128 * 127 + 1, 1.0]
        assert model(x).flatten().tolist() == [4 * 127 * 127 + 1, 1.0]
        other: Any = net()[:1]
        x = torch.rand(5, 256)
        other[0].weight[:, 0] = 2 * other[0].weight.abs().amax()  # codes 127, of inputs -127; the others half
        x[:, 0] = -1.0
        torch.testing.assert_close(saturating(other)(x), other(x))


def test_unsigned_codes_and_corrections_are_the_same_sums() -> None:
    """Equal but for float32's last bits, with zero points and without."""
    tokens = qat.QuantSpec(qtype="int8", block=(1, 32), divide="reciprocal", scale="float32")
    plain = qat.QuantSpec(qtype="int4", block=(1, 32), range="signed_max")
    other = qat.QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point")
    torch.manual_seed(0)
    for spec in (plain, other):
        model: Any = torch.nn.Sequential(torch.nn.Linear(128, 16))
        qat.prepare(model, [qat.Rule(scheme=qat.Scheme(weight=spec, input=tokens))])
        x = torch.randn(3, 5, 128)
        with torch.no_grad():
            torch.testing.assert_close(unsigned(model)(x), model(x), rtol=1e-5, atol=1e-6)
    said = known("onnxruntime_int4@8bit", "ort")
    assert said is not None
    assert said[1] == UNSIGNED
    assert known("onnxruntime_int4_float@8bit", "ort") is None  # nothing is rounded there
    error, moved = torch.tensor([1e-7, 1e-3, 1e-3, 1e-3]), torch.tensor([1e-7, 1e-3])
    why = ("onnxruntime_int4@8bit", "onnx")
    assert "25% of the prompts" in cause(*why, "**logits**", (UNSIGNED, moved, error), moved, 1e-6)
    assert cause(*why, "**logits**", (UNSIGNED, moved, moved), error, 1e-6) == "not traced"  # it moves less
    assert cause(*why, "**codes**", (UNSIGNED, moved, error), error, 1e-6) == "not traced"
    assert cause(*why, "**greedy**", (UNSIGNED, moved, error), error, 1e-6, "5 of 64") == "5 of 64"


def test_what_is_known_of_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parity_causes.info", lambda: "flags: avx2")
    said = known("vllm_w8a8", "transformers_folder"), known("vllm_w8a8", "vllm"), known("vllm_w8a8_static", "vllm")
    assert [found and found[1] for found in said] == [FORMULA, SATURATED, SATURATED]
    assert known("vllm_w8a8_static", "transformers_folder") is None
    assert known("vllm_w4a8", "vllm") is None
    monkeypatch.setattr("parity_causes.info", lambda: "flags: avx2 avx_vnni")
    assert known("vllm_w8a8", "vllm") is None
    x = torch.tensor([3e-7])
    assert cause("vllm_w8a8", "hf", "**greedy**", None, x, 1.0) == "not traced"
    assert "error is 3.0e-07, 100% within" in cause("vllm_w8a8", "hf", "**logits**", (FORMULA, x, x), x, 1.0)
    assert cause("vllm_w8a8", "hf", "none", (FORMULA, x, x), x, 1.0) == ""
