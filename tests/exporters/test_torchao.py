"""The torchao target: torchao's own bytes and dequantization, and transformers' reload without our package."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_logits import differences, layer_by_layer, logits, plain_transformers, rules, spread, trained
from prepared_models import INT4, INT8, ZERO, prepared, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat.affine import choose_qparams, quantize
from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import export, hf_folder, identify, read_any, torchao
from qat.exporters.torchao import ASYMMETRIC, SYMMETRIC
from qat.scheme import QuantSpec, Rule
from qat.verification import verify

support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
CHANNEL = QuantSpec(qtype="int8")
SIGNED = QuantSpec(qtype="int4", block=(1, 32), range="minmax", offset="zero_point", scale="bfloat16")
FLOAT_INPUTS: dict[str, list[Rule]] = {
    "int4": rules("int4_g32_linear"),
    "int8 channel": rules("w8a16"),
    "int8 groups": [rule(None, "lm_head"), rule(INT8)],
    "uint4 zero points": [rule(None, "lm_head"), rule(ZERO)],
    "int4 zero points": [rule(None, "lm_head"), rule(SIGNED)],
    "int2 to int7 channels": [
        rule(None, "lm_head"),
        *(
            rule(QuantSpec(qtype=f"int{b}"), f".*({p})_proj")
            for b, p in ((2, "q|k"), (3, "v|o"), (5, "gate"), (6, "up"))
        ),
        rule(QuantSpec(qtype="int7")),
    ],
    "left and mixed": [rule(None, ".*(lm_head|k_proj)"), rule(INT4, ".*(q|o)_proj"), rule(CHANNEL)],
}
INT8_INPUTS: dict[str, list[Rule]] = {
    "8da4w": rules("8da4w"),
    "int8 dynamic": rules("torchao_int8_dynamic"),
    "mixed dynamic": [
        rule(None, "lm_head"),
        rule(SIGNED, ".*self_attn.*", input=ASYMMETRIC),
        rule(CHANNEL, input=SYMMETRIC),
    ],
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("torchao")
    models = {n: trained("qwen2", r) for n, r in {**FLOAT_INPUTS, **INT8_INPUTS}.items()}
    models["untied head"] = trained("llama", [rule(INT4)])
    models["bfloat16"] = trained("llama", FLOAT_INPUTS["int4"], torch.bfloat16)
    folders = {n: export(frozen, "torchao", root / n) for n, (_, frozen) in models.items()}
    got, layers, failed = plain_transformers(folders, root, INT8_INPUTS)
    assert not failed
    return {"models": models, "folders": folders, "logits": got, "layers": layers}


@pytest.mark.parametrize("name", [*FLOAT_INPUTS, "untied head"])
def test_transformers_computes_what_was_trained(name: str, loaded: dict[str, Any]) -> None:
    assert differences(loaded["logits"][name], logits(loaded["models"][name][0])).max() <= 2e-6


@pytest.mark.parametrize("name", INT8_INPUTS)
def test_every_layer_quantizes_tokens_as_they_were_trained(name: str, loaded: dict[str, Any]) -> None:
    assert layer_by_layer(loaded["layers"][name], loaded["models"][name][0]) <= 2e-6


def test_8da4w_prompts(loaded: dict[str, Any]) -> None:
    found = differences(loaded["logits"]["8da4w"], logits(loaded["models"]["8da4w"][0], 50))
    assert (found <= 2e-6).double().mean() >= 1 / 3
    assert found.median() <= spread(loaded["models"]["8da4w"][0]).median()


@pytest.mark.parametrize("name", ["int8 dynamic", "mixed dynamic"])
def test_int8_dynamic_is_equal_bit_for_bit(name: str, loaded: dict[str, Any]) -> None:
    """A token whose extreme is negative sits on a tie, -127.5, that the last bit decides: nothing less will do."""
    model, _ = loaded["models"][name]
    assert differences(loaded["logits"][name], logits(model, 50)).max() == 0
    for layer in model.modules():
        if getattr(layer, "input_quantizer", None) is not None:
            layer.train()  # the float product
    found = differences(loaded["logits"][name], logits(model, 50))
    model.eval()
    assert (found > 1e-4).double().mean() > 1 / 3


def test_bfloat16_has_the_weights_cast_last(loaded: dict[str, Any]) -> None:
    model, _ = loaded["models"]["bfloat16"]
    want = [x.float() for x in logits(model)]
    assert differences(loaded["logits"]["bfloat16"], want).max() == 0


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
@pytest.mark.parametrize("name", [*FLOAT_INPUTS, *INT8_INPUTS])
def test_it_is_read_back_and_torchaos_tensors_hold_our_weights(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    _, frozen = trained(kind, {**FLOAT_INPUTS, **INT8_INPUTS}[name], dtype)
    path = export(frozen, "torchao", tmp_path / "out")
    back = torchao.read(path)
    assert back.digests() == frozen.digests()
    assert back.inputs == frozen.inputs
    assert back.ties == frozen.ties
    frozen.save(tmp_path / "frozen")
    (path / "manifest.json").unlink()
    assert not verify(path, against=tmp_path / "frozen", runtime=False).differences
    with safe_open(path / "model.safetensors", "pt") as f:
        tensors, left = support.unflatten_tensor_state_dict(load_file(path / "model.safetensors"), f.metadata())
    assert not left
    for weight, w in frozen.weights.items():
        assert torch.equal(tensors[weight].dequantize(), w.dequantize().to(dtype))
    # and what torchao would itself write of these tensors
    flat, metadata = support.flatten_tensor_state_dict(tensors)
    with safe_open(path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == flat.keys()
        assert all(torch.equal(f.get_tensor(k), t) and f.get_tensor(k).dtype == t.dtype for k, t in flat.items())
        written = {k: json.loads(v) for k, v in f.metadata().items() if k != "format"}
    theirs = {k: json.loads(v) for k, v in metadata.items()}
    for meta in [*written.values(), *theirs.values()]:
        if isinstance(meta, dict) and "_tensor_data_names" in meta:
            meta["_tensor_data_names"].sort()
    assert {**written, "tensor_names": sorted(written["tensor_names"])} == {
        **theirs,
        "tensor_names": sorted(theirs["tensor_names"]),
    }


def test_codes_of_its_own_quantizers_are_read_back(tmp_path: Path) -> None:
    """A folder that torchao and transformers wrote alone: our reader's codes are those that our grid gives."""
    from prepared_models import tiny
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = tiny("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "float")
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(config))
    theirs.save_pretrained(tmp_path / "theirs")
    assert identify(tmp_path / "theirs") == ("torchao", None)
    back = torchao.read(tmp_path / "theirs")
    spec = QuantSpec(qtype="int4", block=(1, 32), range="absmax_half", divide="stored_inverse", scale="float32")
    assert len(back.weights) == len(back.inputs) == 14
    for name, w in back.weights.items():
        x = model.get_parameter(name).detach()
        want = quantize(x, choose_qparams(x, spec), spec)
        assert torch.equal(w.tensor.codes, want.codes)
        assert torch.equal(w.tensor.scale, want.scale)


REFUSED = {
    "not Conv1D": ("gpt2", [rule(INT4, kind="Conv1D")]),
    "blocks of several rows": ("llama", [rule(QuantSpec(qtype="int4", block=(2, 32)))]),
    "int4, symmetric or": ("llama", [rule(QuantSpec(qtype="uint4", block=(1, 32), range="mlx", offset="float16"))]),
    "scheme=8da4w": ("llama", [rule(INT4, input=replace(SYMMETRIC, integer_dot=False))]),
    "scheme=torchao_int8_dynamic": ("llama", [rule(CHANNEL, input=replace(SYMMETRIC, divide="stored"))]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_at_the_audit_and_at_the_export(why: str, tmp_path: Path) -> None:
    from prepared_models import tiny

    kind, scheme = REFUSED[why]
    model = tiny(kind)
    with pytest.raises(UserError, match=why):
        audit(model, scheme, targets=["torchao"], config=model.config.to_dict())
    with pytest.raises(UserError, match=why):
        export(prepared(kind, scheme)[1], "torchao", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frozen = trained("llama", FLOAT_INPUTS["int4"])
    path = export(frozen, "torchao", tmp_path / "out")
    with safe_open(path / "model.safetensors", "pt") as f:
        tensors, metadata = load_file(path / "model.safetensors"), f.metadata()
    key = "model.layers.0.self_attn.q_proj._weight_scale"
    tensors[key][0, 0] = tensors[key][0, 0].nextafter(torch.tensor(9.0))  # one ulp of float32: no longer portable
    save_file(tensors, path / "model.safetensors", metadata)
    (path / "manifest.json").unlink()
    frozen.save(tmp_path / "frozen")
    assert "stored scales differ" in verify(path, against=tmp_path / "frozen", runtime=False).differences[0]
    save_file(tensors, path / "model.safetensors", {**metadata, "tensor_names": '["nothing.weight"]'})
    with pytest.raises(VerifyError, match="cannot be decoded"):
        read_any(path)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 60_000)
    assert torchao.read(export(frozen, "torchao", tmp_path / "shards")).digests() == frozen.digests()
    with pytest.raises(UserError, match="quant_method"):
        torchao.read(export(frozen, "hf", tmp_path / "hf"))
