"""Decoders as ONNX: codes read back by plain numpy; ONNX Runtime's logits and text are the fake-quantized model's."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_decoders import MODELS, apart, check_short_prompts, logits, prepared, tokens, unpacked
from tiny_text_models import VOCAB, tiny
from tokenizers import Tokenizer

from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import export, onnx_stream, read_any
from qat.exporters.onnx import FILE, read, refuse
from qat.exporters.onnx_nbits import level_4
from qat.runtimes import run
from qat.runtimes.ort import open_session
from qat.runtimes.ort_text import Decoder
from qat.scheme import QuantSpec, Rule, Scheme
from qat.verification import verify

EMBEDDINGS = r".*(wte|embed_tokens|lm_head)"
INT8 = QuantSpec(qtype="int8", block=(1, 32))
GRIDS = {
    "int4": QuantSpec(qtype="int4", block=(1, 32), range="signed_max"),
    "int4_zero": QuantSpec(qtype="int4", block=(1, 16), range="minmax", offset="zero_point", scale="float32"),
    "uint4": QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"),
    "int2": QuantSpec(qtype="int2", block=(1, 32), range="absmax_half", scale="float16"),
    "uint2": QuantSpec(qtype="uint2", block=(1, 32), range="minmax", offset="zero_point", scale="bfloat16"),
    "ternary": QuantSpec(qtype="ternary", block=(1, 32), range="absmax_half"),
    "int8": QuantSpec(qtype="int8", block=(1, 16)),
    "uint8": QuantSpec(qtype="uint8", block=(1, 32), range="minmax", offset="zero_point"),
}


def rules(linear: QuantSpec, embedding: QuantSpec = INT8, int8_inputs: bool = False) -> list[Rule]:
    def scheme(weight: QuantSpec) -> Scheme:
        return Scheme(weight=weight, input=level_4(weight.block[1]) if int8_inputs else None)

    return [Rule(path=EMBEDDINGS, scheme=scheme(embedding)), Rule(type="Linear|Conv1D", scheme=scheme(linear))]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codes_scales_and_logits_of_every_grid(grid: str, dtype: torch.dtype, tmp_path: Path) -> None:
    embedding = GRIDS[grid] if "8" in grid or "4" in grid else INT8
    model, frozen = prepared("gpt2", rules(GRIDS[grid], embedding), dtype)
    folder = export(frozen, "onnx", tmp_path / "out")
    back = read(folder)
    assert back.digests() == frozen.digests()
    assert back.ties == frozen.ties
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(folder / FILE)).graph.initializer}
    for name, w in frozen.weights.items():
        spec, scale = w.tensor.spec, held[f"{name}.scale"]
        codes = unpacked(held[name].reshape(len(scale), -1), spec.type.bits).reshape(*scale.shape, -1)
        zero = np.full(scale.shape, 2 ** (spec.type.bits - 1))
        if f"{name}.zero_point" in held:
            zero = unpacked(held[f"{name}.zero_point"].reshape(len(scale), -1), spec.type.bits)[:, : scale.shape[1]]
        values = (codes.astype(np.float32) - zero[..., None].astype(np.float32)) * scale[..., None]
        want = w.dequantize().t() if w.kind == "Conv1D" else w.dequantize()
        assert np.array_equal(values.reshape(len(scale), -1), want.numpy()), name
    ids = tokens(4, 12)
    assert apart(Decoder(folder).step(ids.numpy())[0], logits(model, ids)) <= 2e-6


@pytest.mark.parametrize("int8_inputs", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("grid", ["int4_zero", "int8"])
def test_odd_shapes(grid: str, int8_inputs: bool, tmp_path: Path) -> None:
    """Three and five blocks in a row: their zero points end within a byte."""
    table = QuantSpec(qtype="uint4", block=(1, 16), range="minmax", offset="zero_point")
    model, frozen = prepared("odd", rules(GRIDS[grid], table, int8_inputs))
    folder = export(frozen, "onnx", tmp_path / "out")
    assert read(folder).digests() == frozen.digests()
    if int8_inputs:
        check_short_prompts(model, folder)
    else:
        ids = tokens(3, 20)
        assert apart(Decoder(folder).step(ids.numpy())[0], logits(model, ids)) <= 2e-6


@pytest.mark.parametrize("name", [n for n in MODELS if n != "odd"])
def test_logits_and_cache_of_every_family(name: str, tmp_path: Path) -> None:
    model, frozen = prepared(name, rules(GRIDS["int4"]))
    folder = export(frozen, "onnx", tmp_path / "out")
    assert read(folder).digests() == frozen.digests()
    decoder, ids = Decoder(folder), tokens(3, 24)
    want = logits(model, ids)
    assert apart(decoder.step(ids.numpy())[0], want) <= 2e-6
    past, parts = None, []
    for part in ids.numpy().T[:, :, None]:
        made, past = decoder.step(part, past=past)
        parts.append(made)
    assert apart(np.concatenate(parts, 1), want) <= 2e-6
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # a shorter text, padded on the left: its logits do not depend on what the padding is
    padded = torch.where(mask.bool(), ids, 0)
    made = decoder.step(padded.numpy(), mask.numpy())[0]
    assert apart(made[1, 7:], logits(model, ids[1:2, 7:])[0]) <= 2e-6
    assert apart(made[[0, 2]], want[[0, 2]]) <= 2e-6


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("grid", ["int4", "int4_zero", "int8", "ternary"])
def test_int8_inputs_are_those_that_training_simulates(name: str, grid: str, tmp_path: Path) -> None:
    """Accuracy level 4."""
    model, frozen = prepared(name, rules(GRIDS[grid], int8_inputs=True))
    folder = export(frozen, "onnx", tmp_path / "out")
    back = read(folder)
    assert back.digests() == frozen.digests()
    assert {n: i.spec for n, i in back.inputs.items()} == {n: i.spec for n, i in frozen.inputs.items()}
    check_short_prompts(model, folder)


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
@pytest.mark.parametrize("int8_inputs", [False, True], ids=["float", "int8"])
def test_greedy_text_of_its_own_process(name: str, int8_inputs: bool, tmp_path: Path) -> None:
    """64 tokens from the .onnx and tokenizer.json alone, equal up to a step whose margin is rounding."""
    model, frozen = prepared(name, rules(GRIDS["int4"], int8_inputs=int8_inputs))
    folder = export(frozen, "onnx", tmp_path / "out")
    for file in folder.iterdir():
        if file.name not in (FILE, "tokenizer.json"):
            file.unlink()
    prompt = "def main(self, argument):"
    request = {"prompt": prompt, "n_predict": 64, "temperature": 0.0, "seed": 0}
    said = run("ort", folder, complete=json.dumps(request), tokenize=[prompt], version="")
    assert said["version"].startswith("onnxruntime ")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert said["tokenize"] == [tokenizer.encode(prompt).ids]
    ids = tokenizer.encode(prompt).ids
    have, end = Decoder(folder).generate(ids, 64), model.config.eos_token_id
    assert said["complete"] == tokenizer.decode(have)
    double = copy.deepcopy(model).double()
    for step in range(64):
        row = torch.tensor([ids])
        want = logits(model, row)[0, -1]
        first, second = want.topk(2).values
        if have[step] != int(want.argmax()):
            spread = (logits(double, row)[0, -1] - want).abs().max()
            assert first - second <= 2 * spread, step
            break
        ids = [*ids, have[step]]
        if have[step] == end:
            assert len(have) == step + 1
            break
    else:
        assert len(have) == 64


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for name in ("gpt2", "gpt2_untied"):
        _, frozen = prepared(name, rules(GRIDS["int4"]))
        sizes[name] = (export(frozen, "onnx", tmp_path / name) / FILE).stat().st_size
    table = VOCAB * 64 + 4 * VOCAB * 64 // 32  # codes and scales
    assert table <= sizes["gpt2_untied"] - sizes["gpt2"] <= table + 4096


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (QuantSpec(qtype="int3", block=(1, 32)), "use int4"),
        (QuantSpec(qtype="uint5", block=(1, 32), range="minmax", offset="zero_point"), "use uint8"),
        (QuantSpec(qtype="int4", block=(1, 8)), r"use block \(1, 16\)"),
        (QuantSpec(qtype="int4", block=(2, 32)), r"use block \(1, 32\)"),
        (QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="float16"), "use offset: zero_point"),
    ],
)
def test_grids_that_the_operators_do_not_hold_are_refused_with_a_near_one(spec: QuantSpec, why: str) -> None:
    with pytest.raises(UserError, match=rf"export to onnx: transformer\.h\.0\.attn\.c_attn\.weight .*{why}"):
        audit(tiny("gpt2"), [Rule(type="Conv1D", scheme=Scheme(weight=spec))], targets=["onnx"], config=config("gpt2"))


def test_inputs_that_the_operators_do_not_round_are_refused_at_the_audit() -> None:
    weight, two = GRIDS["int4"], QuantSpec(qtype="int2", block=(1, 16))
    for given, of, why in (
        (replace(level_4(32), divide="stored"), weight, "divide: reciprocal"),
        (level_4(16), weight, r"block: \[1, 32\]"),
        (level_4(16), two, "2-bit weights take rounded inputs in blocks of 32, 64 or 128"),
    ):
        rule = Rule(type="Conv1D", scheme=Scheme(weight=of, input=given))
        with pytest.raises(UserError, match=rf"export to onnx: transformer\.h\.0\.attn\.c_attn\.weight .*{why}"):
            audit(tiny("gpt2"), [rule], targets=["onnx"], config=config("gpt2"))


def test_models_that_the_graph_does_not_compute_are_refused() -> None:
    for changes, why in (
        ({"model_type": "bloom"}, "knows bert, gpt2, llama"),
        ({"activation_function": "mish"}, "activations"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "rotary positions"),
    ):
        assert why in str(refuse("transformer.wte.weight", "Embedding", (8, 64), None, {**config("gpt2"), **changes}))


def config(name: str) -> dict[str, Any]:
    return tiny(MODELS[name][0], **MODELS[name][1]).config.to_dict()


@pytest.mark.parametrize("op", ["swap", "nibbles", "scale", "level", "positions", "cut"])
def test_damage_is_found(op: str, tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", rules(GRIDS["int4"], int8_inputs=True))
    frozen.save(tmp_path / "frozen")
    folder = export(frozen, "onnx", tmp_path / "out")
    (folder / "manifest.json").unlink()
    file = folder / FILE
    model = onnx.load(str(file))
    nodes = {n.name: n for n in model.graph.node}
    held = {t.name: t for t in model.graph.initializer}
    name = "transformer.h.0.attn.c_attn"
    if op == "swap":  # two layers of one shape read each other's codes
        a, b = nodes["transformer.h.0.mlp.c_fc"], nodes["transformer.h.1.mlp.c_fc"]
        a.input[1], b.input[1] = b.input[1], a.input[1]
    elif op == "nibbles":
        codes = np.frombuffer(held[f"{name}.weight"].raw_data, np.uint8)
        held[f"{name}.weight"].raw_data = (codes >> 4 | codes << 4).astype(np.uint8).tobytes()
    elif op == "scale":
        scales = np.frombuffer(held[f"{name}.weight.scale"].raw_data, np.float32).copy()
        scales[5] = np.nextafter(scales[5], np.float32(np.inf))
        held[f"{name}.weight.scale"].raw_data = scales.tobytes()
    elif op == "level":
        next(a for a in nodes[name].attribute if a.name == "accuracy_level").i = 0
    elif op == "positions":
        table = numpy_helper.to_array(held["transformer.wpe.weight"])
        held["transformer.wpe.weight"].raw_data = np.roll(table, 1, 0).tobytes()
    file.write_bytes(model.SerializeToString()[: -1000 if op == "cut" else None])
    with pytest.raises(VerifyError):
        verify(folder, against=tmp_path / "frozen", runtime=False).raise_if_different()


def test_tensors_beyond_a_protobuf_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_stream, "PROTOBUF_LIMIT", 50_000)
    model, frozen = prepared("llama", rules(GRIDS["int4"]))
    folder = export(frozen, "onnx", tmp_path / "out")
    assert (folder / f"{FILE}.data").stat().st_size > 50_000
    assert read(folder).digests() == frozen.digests()
    ids = tokens(2, 12)
    assert apart(Decoder(folder).step(ids.numpy())[0], logits(model, ids)) <= 2e-6
    with (folder / f"{FILE}.data").open("r+b") as file:
        file.truncate(40_000)
    (folder / "manifest.json").unlink()
    with pytest.raises(VerifyError, match="External data length"):
        read_any(folder)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_onnxruntime_keeps_the_norms_as_they_are(kind: str, tmp_path: Path) -> None:
    """A sum and the norm after it, fused, are a kernel of other arithmetic than `kernels: onnxruntime` has."""
    _, frozen = prepared(kind, rules(GRIDS["int4"], int8_inputs=True))
    folder = export(frozen, "onnx", tmp_path / "out")
    open_session(folder, optimized=tmp_path / "optimized.onnx")
    kinds = [n.op_type for n in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert not [k for k in kinds if k.startswith("Skip")]
    norms = sum("Normalization" in n.op_type for n in onnx.load(str(folder / FILE)).graph.node)
    assert sum(k in ("LayerNormalization", "RMSNormalization") for k in kinds) == norms > 0
