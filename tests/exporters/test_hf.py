"""The Hugging Face folder: what is written is read back bit for bit, and plain transformers never invents weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_models import ALL, CHANNEL, INT4, INT8, LINEAR, NEGATIVE, ZERO, logits, prepared, rule
from safetensors.torch import load_file

from qat.errors import UserError, VerifyError
from qat.exporters import export, hf, hf_folder
from qat.frozen import Frozen
from qat.scheme import QuantSpec

GRIDS = {
    "int2": QuantSpec(qtype="int2", block=(1, 16)),
    "int3 channel": QuantSpec(qtype="int3"),
    "int5": QuantSpec(qtype="int5", block=(1, 32), scale="float32"),
    "int8 tensor": QuantSpec(qtype="int8", block=(-1, -1), scale="bfloat16"),
    "uint4 zero point": ZERO,
    "uint3 zero point channel": QuantSpec(qtype="uint3", range="minmax", offset="zero_point"),
    "int8 zero point": QuantSpec(qtype="int8", block=(1, 32), range="minmax", offset="zero_point"),
    "uint4 mlx": QuantSpec(qtype="uint4", block=(1, 32), range="mlx", scale="float16", offset="float16"),
    "blocks": QuantSpec(qtype="int4", block=(16, 16)),
    "blocks zero point": QuantSpec(qtype="uint4", block=(16, 16), range="minmax", offset="zero_point"),
}
INPUT = QuantSpec(qtype="int8", block=(1, -1), scale="float32")


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_read_back_bit_for_bit(grid: str, tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", [rule(INT8, ".*wte", "Embedding"), rule(None, ".*lm_head"), rule(GRIDS[grid])])
    back = hf.read(export(frozen, "hf", tmp_path / "out"))
    assert back.digests() == frozen.digests()
    assert {n: (w.kind, w.shape, w.tensor.spec) for n, w in back.weights.items()} == {
        n: (w.kind, w.shape, w.tensor.spec) for n, w in frozen.weights.items()
    }
    assert back.ties == frozen.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert back.tokenizer == frozen.tokenizer
    config = json.loads(json.dumps(frozen.config))  # id2label gets strings for keys, as in any config.json
    changed = {k for k in config if k not in back.config or config[k] != back.config[k]}
    assert changed <= {"dtype", "_name_or_path"}


def test_quantized_inputs_are_read_back(tmp_path: Path) -> None:
    _, frozen = prepared("llama", [rule(None, "lm_head"), rule(INT4, input=INPUT)])
    assert frozen.inputs
    back = hf.read(export(frozen, "hf", tmp_path / "out"))
    assert back.inputs == frozen.inputs


def test_a_tied_tensor_is_stored_once_and_everything_packed_is_int32(tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", ALL)
    tensors = load_file(export(frozen, "hf", tmp_path / "out") / "model.safetensors")
    assert not any(n.startswith("lm_head") for n in tensors)
    for name, w in frozen.weights.items():
        assert tensors[name].dtype == torch.int32
        assert tensors[name].shape != w.shape
        assert tensors[name].nbytes * 8 == w.tensor.codes.numel() * w.tensor.spec.type.bits
    assert tensors.keys() == frozen.floats.keys() | {n + e for n in frozen.weights for e in ("", "_scale")}


def test_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 60_000)
    _, frozen = prepared("llama", ALL)
    path = export(frozen, "hf", tmp_path / "out")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert hf.read(path).digests() == frozen.digests()
    next(path.glob("model-00001*")).unlink()
    with pytest.raises(VerifyError, match="model-00001"):
        hf.read(path)


PLAIN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
ids = load_file(sys.argv[2])["ids"]
answers, logits = {}, {}
for name, (folder, kind, dtype) in json.loads(sys.argv[1]).items():
    cls = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    try:
        model = cls.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            model(ids)  # decompresses
            for p in model.parameters():
                p.data = p.data.clone()  # mapped off a 64-byte boundary, BLAS sums one to three rows in another order
            inputs = [ids, *(ids[:1, :n] for n in (1, 2, 3))]
            logits[name] = torch.cat([model(i).logits.flatten() for i in inputs])
        answers[name] = str(model.dtype)
    except Exception as e:
        answers[name] = f"{type(e).__name__}: {e}"
    assert "qat" not in sys.modules
save_file(logits, sys.argv[3])
print(json.dumps(answers))
"""

RAISING = {
    "gpt2": ("gpt2", ALL),
    "int8": ("llama", [rule(INT8, ".*", "Linear|Embedding")]),
    "asymmetric": ("llama", [rule(ZERO)]),
}
MIXED = [rule(None, "lm_head"), rule(CHANNEL, ".*self_attn.*"), rule(INT4, ".*(gate|up)_proj"), rule(NEGATIVE)]
LOADING: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", LINEAR, {}),
    "mixed and tied": ("llama", MIXED, {"tie_word_embeddings": True}),
    "quantized head": ("llama", [rule(INT4)], {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", LINEAR, {}),
    "int3 channel": ("qwen2", [rule(None, "lm_head"), rule(QuantSpec(qtype="int3"))], {}),
    "bert": ("bert", LINEAR, {}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that never imports qat makes of the folders: texts by name, and the `logits` it computed."""
    from prepared_models import IDS
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("plain")
    save_file({"ids": IDS}, root / "ids")
    models: dict[str, tuple[Any, Frozen]] = {}
    asked: dict[str, tuple[str, str, str]] = {}
    for name, (kind, rules, *changes) in {**RAISING, **LOADING}.items():
        models[name] = prepared(kind, rules, **(changes[0] if changes else {}))  # type: ignore[arg-type]
        folder = export(models[name][1], "hf", root / name)
        asked[name] = (str(folder), kind, "auto")
        asked[f"{name} bfloat16"] = (str(folder), kind, "bfloat16")
    command = [sys.executable, "-c", PLAIN, json.dumps(asked), str(root / "ids"), str(root / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    return {"answers": answers, "logits": load_file(root / "logits"), "models": models, "root": root}


@pytest.mark.parametrize("name", RAISING)
def test_plain_transformers_raises_rather_than_inventing_weights(name: str, plain: dict[str, Any]) -> None:
    config = json.loads((plain["root"] / name / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qat"
    assert plain["answers"][name].startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`")
    assert name not in plain["logits"]


@pytest.mark.parametrize("name", LOADING)
def test_plain_transformers_computes_what_was_trained(name: str, plain: dict[str, Any]) -> None:
    """compressed-tensors' own loader, decompressor and transformers' model: no bit differs, in float32."""
    config = json.loads((plain["root"] / name / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    model, frozen = plain["models"][name]
    assert plain["answers"][name] == "torch.float32"
    assert torch.equal(plain["logits"][name], logits(model))
    if any(w.tensor.spec.range == "signed_max" for w in frozen.weights.values()):
        assert any((w.tensor.scale < 0).any() for w in frozen.weights.values())


@pytest.mark.parametrize("name", LOADING)
def test_plain_transformers_in_bfloat16_has_the_weights_cast_last(name: str, plain: dict[str, Any]) -> None:
    """Its product of code and bfloat16 scale is the float32 weight rounded once, since portable scales are exact."""
    from prepared_models import tiny

    kind, _, changes = LOADING[name]
    _, frozen = plain["models"][name]
    model = tiny(kind, **changes)
    model.load_state_dict(frozen.state_dict())
    assert plain["answers"][f"{name} bfloat16"] == "torch.bfloat16"
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32, as in from_pretrained
        p.data = p.data.bfloat16()
    assert torch.equal(plain["logits"][f"{name} bfloat16"], logits(model))


def test_refusals() -> None:
    assert "model_type" in str(hf.refuse("0.weight", "Linear", (8, 8), INT4, {"architecture": "digits"}))
    assert "one input" in str(hf.refuse("a.weight", "Linear", (8, 1), INT4, {"model_type": "llama"}))
    assert hf.refuse("a.weight", "Conv1D", (8, 1), INT4, {"model_type": "gpt2"}) is None
    assert hf.refuse("a.weight", "Conv2d", (8, 1, 3, 3), INT4, {"model_type": "resnet"}) is None
    with pytest.raises(UserError, match="model_type"):
        hf.export(Frozen(prepared("llama", LINEAR)[1].weights, {}), Path("nowhere"))


def test_damage_is_named(tmp_path: Path) -> None:
    _, frozen = prepared("gpt2", ALL)
    path = export(frozen, "hf", tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    name = "transformer.h.0.attn.c_attn.weight"
    config["quantization_config"]["weights"][name]["shape"] = [96, 192]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=name):
        hf.read(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(VerifyError, match=r"model\.safetensors"):
        hf.read(path)
    file.unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        hf.read(path)
    config["quantization_config"] = {"quant_method": "gptq"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gptq"):
        hf.read(path)
