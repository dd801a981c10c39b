"""Folders for vLLM: against its formulas in numpy, compressed-tensors' own bytes, and plain transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from peer_logits import differences, logits, plain_transformers, rules, trained
from prepared_models import INT4, rule
from safetensors.torch import load_file

import qat
from qat.affine import QParams, choose_qparams, dequantize, quantize
from qat.exporters import compressed_tensors, export, hf
from qat.exporters.compressed_tensors import RANGE, TENSOR, TOKEN
from qat.report.card import card
from qat.scheme import QuantSpec
from qat.verification import verify

SCHEMES = ["w8a16", "w8a8", "w8a8_static", "w4a8", "int4_g128_asymmetric"]


def equal(have: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_dynamic_tokens_are_vllms() -> None:
    """vLLM: scale = max|x| / 127, code = saturate(rne(x * (127 / max|x|))), all 0 for a token of zeros."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((300, 96)) * 10.0 ** rng.integers(-6, 5, (300, 1))).astype(np.float32)
    x[7], x[9] = 0, x[9, 0]
    top = np.abs(x).max(1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(top == 0, np.float32(0), np.float32(127) / top)
    q = quantize(torch.from_numpy(x), choose_qparams(torch.from_numpy(x), TOKEN), TOKEN)
    assert np.array_equal(q.codes.numpy(), np.clip(np.rint(x * inverse), -128, 127).astype(np.int8))
    assert np.array_equal(q.scale.numpy(), np.where(top == 0, np.float32(1), top / np.float32(127)))


def test_static_inputs_are_vllms() -> None:
    """vLLM: code = saturate(rne(x / scale)), one scale in all."""
    x = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32) * 3
    spec = replace(TENSOR, scale="float32")
    scale = np.float32(0.0173)
    codes = np.clip(np.rint(x / scale), -128, 127).astype(np.int8)
    q = quantize(torch.from_numpy(x), QParams(torch.full((1, 1), scale)), spec)
    assert np.array_equal(q.codes.numpy(), codes)
    assert {-128, 127} <= set(codes.flatten().tolist())


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_the_librarys_own(scheme: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Its compressors, given our weights and scales, store what we store; its decompressors give our weights back."""
    _, frozen = trained(kind, rules(scheme), dtype)
    path = export(frozen, "hf", tmp_path / "out")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    stored = load_file(path / "model.safetensors")
    for name, w in frozen.weights.items():
        module = name.removesuffix("weight")
        mine = {k.removeprefix(module): t for k, t in stored.items() if k.startswith(module) and "bias" not in k}
        state = {"weight": dequantize(w.tensor), "weight_scale": w.tensor.scale.float()}
        if w.tensor.offset is not None:
            state["weight_zero_point"] = w.tensor.offset.to(torch.int8)
        theirs = compressor.compress(state, group)
        assert mine.keys() - {"input_scale"} == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(mine[key], value.to(mine[key].dtype)), key
            assert mine[key].dtype == value.dtype or key == "weight_scale"
        back = compressor.decompress({**mine, "weight_scale": mine["weight_scale"].float()}, group)
        assert torch.equal(back["weight"], w.dequantize())
    back = hf.read(path)
    assert back.digests() == frozen.digests()
    want = {n: (replace(i.spec, scale=back.inputs[n].spec.scale), i.static) for n, i in frozen.inputs.items()}
    assert {n: (i.spec, i.static) for n, i in back.inputs.items()} == want


def test_fused_layers_share_their_input_scale() -> None:
    model, frozen = trained("llama", rules("w8a8_static"))
    layer = model.model.layers[0]
    q, k, v, o = (getattr(layer.self_attn, f"{n}_proj").input_quantizer for n in "qkvo")
    gate, up, down = (getattr(layer.mlp, f"{n}_proj").input_quantizer for n in ("gate", "up", "down"))
    assert q is k is v
    assert gate is up
    assert len({id(x) for x in (q, o, gate, down)}) == 4
    scales = {n: i.scale for n, i in frozen.inputs.items()}
    assert torch.equal(scales["model.layers.0.self_attn.q_proj"], scales["model.layers.0.self_attn.v_proj"])


INT3 = QuantSpec(qtype="int3", block=(1, 32))
MIXED = [rule(None, "lm_head"), rule(INT4, ".*(q|o)_proj", input=RANGE), rule(INT3, ".*(k|v)_proj"), *rules("w8a8")[1:]]


ROWS = [  # one group a row in most layers, two in the last
    rule(None, "lm_head"),
    rule(QuantSpec(qtype="int4", block=(1, 64), range="minmax", offset="zero_point")),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plain transformers computes from every folder, and what the trained models did."""
    root = tmp_path_factory.mktemp("vllm")
    models, folders = {}, {}
    models["whole rows"] = trained("qwen2", ROWS, intermediate_size=128)
    for name in [*SCHEMES, "mixed"]:
        models[name] = trained("qwen2", MIXED if name == "mixed" else rules(name))
    for name in models:
        folders[name] = export(models[name][1], "hf", root / name)
    got, _, failed = plain_transformers(folders, root)
    return {"logits": got, "models": models, "folders": folders, "failed": failed}


@pytest.mark.parametrize("name", ["w8a16", "w8a8_static", "w4a8", "int4_g128_asymmetric", "whole rows"])
def test_plain_transformers_computes_what_was_trained(name: str, plain: dict[str, Any]) -> None:
    assert equal(plain["logits"][name], logits(plain["models"][name][0]))


@pytest.mark.parametrize("name", ["w8a8", "mixed"])
def test_dynamic_tokens_differ_in_transformers_by_its_own_scale_alone(name: str, plain: dict[str, Any]) -> None:
    """max|x| / 127.5 in place of max|x| / 127: with that rule in our simulation, no bit is left to explain."""
    model, frozen = plain["models"][name]
    got = plain["logits"][name]
    assert 1e-4 < differences(got, logits(model)).max() < 0.3
    inputs = [m.input_quantizer for m in model.modules() if getattr(m, "input_quantizer", None) is not None]
    tokens = [i for i in inputs if i.spec == TOKEN]
    for quantizer in tokens:
        quantizer.spec = replace(TOKEN, range="absmax_half", divide="stored")
    try:
        assert equal(got, logits(model))
    finally:
        for quantizer in tokens:
            quantizer.spec = TOKEN
    (caveat,) = hf.caveats(frozen)
    assert "127.5" in caveat
    assert f"> {caveat}." in card(frozen, "hf", title="t", data="", stages={}, fallback=[]).splitlines()
    assert caveat in verify(plain["folders"][name], against=plain["folders"][name], runtime=False).unchecked


def test_only_asymmetric_weights_fail_without_dequantize(plain: dict[str, Any]) -> None:
    assert sorted(plain["failed"]) == ["int4_g128_asymmetric", "whole rows"]
    assert "ignore_mismatched_sizes" in plain["failed"]["int4_g128_asymmetric"]
    (caveat,) = hf.caveats(plain["models"]["int4_g128_asymmetric"][1])
    assert "dequantize=True" in caveat


@pytest.mark.parametrize("name", [*SCHEMES, "mixed"])
def test_our_loader_computes_what_was_trained(name: str, plain: dict[str, Any]) -> None:
    assert equal(logits(qat.load(plain["folders"][name])), logits(plain["models"][name][0]))
    assert hf.read(plain["folders"][name]).digests() == plain["models"][name][1].digests()


INPUT = replace(TOKEN, divide="stored")
REFUSED = {
    "reciprocal is vLLM's": rule(QuantSpec(qtype="int8"), input=INPUT),
    "its input is quantized": rule(QuantSpec(qtype="int8", range="minmax", offset="zero_point"), input=TOKEN),
    "int8 ones with one scale a channel": rule(QuantSpec(qtype="int8", block=(1, 32)), input=TOKEN),
    "goes with int8 weights": rule(INT4, input=TENSOR, static=True),
    "input scale that": rule(QuantSpec(qtype="int8"), input=replace(TENSOR, scale="float32"), static=True),
    "a float weight": rule(None, ".*down_proj", input=TOKEN),
}


def test_asymmetric_weights_on_two_grids_are_not_given_to_transformers() -> None:
    scheme = [rule(None, "lm_head"), rule(INT4, ".*q_proj"), *rules("int4_g128_asymmetric")[1:]]
    _, frozen = trained("llama", scheme)
    assert "grids differ" in str(compressed_tensors.why_not(frozen, torch.float32))


@pytest.mark.parametrize("why", REFUSED)
def test_what_vllm_computes_otherwise_is_not_given_to_it(why: str) -> None:
    _, frozen = trained(
        "llama", [rule(None, "lm_head"), REFUSED[why], rule(INT4)] if "float" in why else [REFUSED[why]]
    )
    assert why in str(compressed_tensors.why_not(frozen, torch.bfloat16))
    assert "import qat" in hf.readers(replace(frozen, floats={n: t.bfloat16() for n, t in frozen.floats.items()}))[0]
