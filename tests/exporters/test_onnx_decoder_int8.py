"""Decoders with int8 weights a row as ONNX: integer kernels, static inputs and inputs for each token."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_decoders import apart, check_short_prompts, logits, prepared, tokens
from tiny_text_models import tiny

from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import export
from qat.exporters.onnx import FILE, read
from qat.runtimes.ort import operators
from qat.runtimes.ort_text import Decoder
from qat.scheme import QuantSpec, Rule, Scheme
from qat.verification import verify

WEIGHT = QuantSpec(qtype="int8", block=(1, -1))
UINT8 = QuantSpec(qtype="uint8", block=(-1, -1), range="minmax", scale="float32", offset="zero_point")
SYMMETRIC = QuantSpec(qtype="int8", block=(-1, -1), scale="float32")
TOKEN = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
INPUTS = {"uint8": (UINT8, True), "int8": (SYMMETRIC, True), "token": (TOKEN, False)}


def rules(given: str, weight: QuantSpec = WEIGHT) -> list[Rule]:
    spec, static = INPUTS[given]
    scheme = Scheme(weight=weight, input=spec, static=static)
    return [Rule(path=r"(?!(.*\.)?wpe$).*", type="Linear|Conv1D|Embedding", scheme=scheme)]


@pytest.mark.parametrize("name", ["gpt2", "gpt2_untied", "llama_tied", "qwen3"])
@pytest.mark.parametrize("given", INPUTS)
def test_integer_kernels_compute_what_training_simulates(name: str, given: str, tmp_path: Path) -> None:
    model, frozen = prepared(name, rules(given))
    folder = export(frozen, "onnx", tmp_path / "out")
    back = read(folder)
    assert back.digests() == frozen.digests()
    assert {n: (i.spec, i.static) for n, i in back.inputs.items()} == {
        n: (i.spec, i.static) for n, i in frozen.inputs.items()
    }
    ops = Counter(operators(folder))
    kernel = "MatMulInteger" if given == "token" else "MatMulIntegerToFloat"
    assert ops[kernel] == len(frozen.inputs) == (15 if "gpt2" not in name else 9)
    assert not {"MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "Transpose", "DequantizeLinear"} & set(ops), ops
    check_short_prompts(model, folder)


@pytest.mark.parametrize("block", [(1, -1), (-1, -1)], ids=["channel", "tensor"])
def test_initializers_hold_the_codes_seen_by_plain_numpy(block: tuple[int, int], tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", rules("uint8", QuantSpec(qtype="int8", block=block, scale="float32")))
    folder = export(frozen, "onnx", tmp_path / "out")
    assert read(folder).digests() == frozen.digests()
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / FILE)).graph.initializer}
    for name, w in frozen.weights.items():
        assert held[name].dtype == np.int8
        values = held[name].astype(np.float32) * held[f"{name}.scale"].reshape(-1, 1)
        assert np.array_equal(values, (w.dequantize().t() if w.kind == "Conv1D" else w.dequantize()).numpy())
    for module, given in frozen.inputs.items():
        assert held[f"{module}.input.scale"] == given.scale.numpy()
        assert held[f"{module}.input.zero_point"].dtype == np.uint8
        assert held[f"{module}.input.zero_point"] == given.offset.numpy()


def test_a_token_depends_on_no_other(tmp_path: Path) -> None:
    """One at a time with the cache, or with others in a batch: the same codes, so the same logits."""
    model, frozen = prepared("llama_tied", rules("token"))
    decoder, ids = Decoder(export(frozen, "onnx", tmp_path / "out")), tokens(6, 9)
    want, past, close = logits(model, ids), None, []
    for i in range(ids.shape[1]):
        made, past = decoder.step(ids[:, i : i + 1].numpy(), past=past)
        close += [apart(made[row], want[row, i : i + 1]) <= 2e-6 for row in range(len(ids))]
    assert sum(close) >= len(close) / 2  # a flipped code here and there


def test_zero_rows_stay_zero(tmp_path: Path) -> None:
    model, frozen = prepared("gpt2", rules("token"))
    norm = model.get_submodule("transformer.ln_f")
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.zero_()
    frozen.floats |= {f"transformer.ln_f.{n}": p.detach().clone() for n, p in norm.named_parameters()}
    made = Decoder(export(frozen, "onnx", tmp_path / "out")).step(tokens(2, 5).numpy())[0]
    assert not made.any()


def test_inputs_that_no_kernel_computes_are_refused_at_the_audit() -> None:
    config = tiny("gpt2").config.to_dict()
    whole = QuantSpec(qtype="int8", block=(-1, -1), scale="float32")
    for given, static, why in (
        (None, False, r"block \(1, 32\)"),
        (whole, False, "for each token, .*block: \\[1, -1\\]"),
        (QuantSpec(qtype="int4", block=(-1, -1), scale="float32"), True, "takes int8 or uint8"),
    ):
        rule = Rule(type="Conv1D", scheme=Scheme(weight=WEIGHT, input=given, static=static))
        with pytest.raises(UserError, match=rf"c_attn\.weight .*{why}"):
            audit(tiny("gpt2"), [rule], targets=["onnx"], config=config)
    only_table = [Rule(path=".*wte", scheme=Scheme(weight=WEIGHT))]  # its tied head would multiply float inputs
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        audit(tiny("gpt2"), only_table, targets=["onnx"], config=config)


@pytest.mark.parametrize("op", ["codes", "weight_scale", "input_scale", "zero_point", "layer"])
def test_damage_is_found(op: str, tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", rules("uint8"))
    frozen.save(tmp_path / "frozen")
    folder = export(frozen, "onnx", tmp_path / "out")
    (folder / "manifest.json").unlink()
    model = onnx.load(str(folder / FILE))
    held = {t.name: t for t in model.graph.initializer}
    name = "transformer.h.0.mlp.c_fc"
    parts = {"weight_scale": f"{name}.weight.scale", "input_scale": f"{name}.input.scale"}
    if op in parts:
        scale = numpy_helper.to_array(held[parts[op]]).copy()
        scale.flat[0] = np.nextafter(scale.flat[0], np.float32(np.inf))
        held[parts[op]].raw_data = scale.tobytes()
    elif op == "layer":  # reads another layer's codes
        transposed = {n.name: n for n in model.graph.node}[f"{name}/transpose"]
        transposed.input[0] = "transformer.h.1.mlp.c_fc.weight"
    else:
        part = held[f"{name}.weight" if op == "codes" else f"{name}.input.zero_point"]
        part.raw_data = bytes([part.raw_data[0] ^ 1]) + part.raw_data[1:]
    (folder / FILE).write_bytes(model.SerializeToString())
    with pytest.raises(VerifyError, match=re.escape(name)):
        verify(folder, against=tmp_path / "frozen", runtime=False).raise_if_different()
