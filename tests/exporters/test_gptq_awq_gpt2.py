"""GPT-2 in GPTQ and AWQ folders: its Conv1D packed as (out, in), an independent decoder, gptqmodel's own loader."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_logits import PROMPTS, ROOT, differences, logits, rules, trained
from prepared_models import INT4, rule, tiny
from safetensors.torch import load_file, save_file
from test_gptq_awq import decoded
from tiny_text_models import byte_level_tokenizer, tokenizer_files

from qat.auditing import audit
from qat.errors import UserError
from qat.exporters import export, gptq_layout, target_module
from qat.report.card import card
from qat.runtimes import run
from qat.verification import verify

UNTITLED: Any = {"title": "t", "data": "", "stages": {}, "fallback": []}
GRIDS = {
    "symmetric": ("gptq", "int4_g128_linear"),
    "symmetric, v1": ("gptq_v1", "int4_g128_linear"),
    "int8 channel": ("gptq", "w8a16"),
    "zero points": ("gptq", "int4_g128_asymmetric"),
    "awq": ("awq", "int4_g128_asymmetric"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_another_decoder_gives_our_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    target, scheme = GRIDS[name]
    _, frozen = trained("gpt2", rules(scheme), dtype)
    assert {w.kind for w in frozen.weights.values()} == {"Conv1D"}
    path = export(frozen, target, tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for weight, w in frozen.weights.items():
        assert np.array_equal(decoded(stored, weight.removesuffix(".weight"), config), w.dequantize().t().numpy())
    back = target_module(target).read(path)
    assert back.digests() == frozen.digests()
    assert {n: (w.kind, w.shape) for n, w in back.weights.items()} == {
        n: (w.kind, w.shape) for n, w in frozen.weights.items()
    }
    frozen.save(tmp_path / "frozen")
    assert not verify(path, against=tmp_path / "frozen", runtime=False).differences


@pytest.mark.parametrize("target", ["gptq", "gptq_v1", "awq"])
def test_all_layers_or_none(target: str, tmp_path: Path) -> None:
    """gptqmodel makes every Conv1D a packed layer, whatever the folder says, and leaves a missing AWQ one empty."""
    some = [rule(None, ".*(lm_head|mlp.c_proj)"), rule(INT4)]
    model = tiny("gpt2")
    with pytest.raises(UserError, match="takes every Conv1D"):
        audit(model, some, targets=[target], config=model.config.to_dict())
    with pytest.raises(UserError, match="takes every Conv1D"):
        export(trained("gpt2", some)[1], target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    other = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}
    assert "GPT-2's Conv1D" in str(gptq_layout.refuse("Conv1D", (64, 64), INT4, other, "gptq", (4,)))
    assert gptq_layout.refuse("Conv1D", (64, 64), None, other, "gptq", (4,)) is None


def test_the_card_says_how_to_load_it() -> None:
    _, frozen = trained("gpt2", rules("int4_g128_linear"))
    assert "backend=BACKEND.GPTQ_TORCH)" in card(frozen, "gptq", **UNTITLED)
    assert "backend=BACKEND.AWQ_TORCH_ATEN)" in card(frozen, "awq", **UNTITLED)
    assert f"> {gptq_layout.GPT2}." in card(frozen, "gptq", **UNTITLED).splitlines()


RUN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
sys.path.insert(0, sys.argv[1])
from plain_transformers import load
del sys.path[0]  # gptqmodel would find our mlx.py
prompts, out, folders, loaded = load_file(sys.argv[3]), {}, json.loads(sys.argv[2]), []
for name, folder in folders.items():  # before gptqmodel's loader, which patches transformers
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        loaded.append(name)
    except (AttributeError, UnboundLocalError):  # loudly: no layer is initialized at random
        pass
assert not loaded, loaded
for name, folder in folders.items():
    model = load(folder)
    for path, module in model.named_modules():
        if hasattr(module, "awq_weight_dequantize"):
            out[f"{name}/{path}.weight"] = module.awq_weight_dequantize("cpu", torch.float16).contiguous()
        elif hasattr(module, "dequantize_weight"):
            out[f"{name}/{path}.weight"] = module.dequantize_weight().contiguous()
    with torch.no_grad():
        out |= {f"{name}/{i}": model(ids[None]).logits[0].float() for i, ids in prompts.items()}
assert "qat" not in sys.modules
save_file(out, sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_gptqmodel_computes_what_was_trained(tied: bool, gptqmodel_python: str, tmp_path: Path) -> None:
    """As for Llama: its weights are ours rounded once to float16, its logits those of a model with these."""
    models = {n: trained("gpt2", rules(scheme), tie_word_embeddings=tied) for n, (_, scheme) in GRIDS.items()}
    folders = {n: str(export(models[n][1], GRIDS[n][0], tmp_path / n)) for n in GRIDS}
    save_file({str(i): ids for i, ids in enumerate(PROMPTS[:5])}, tmp_path / "prompts")
    command = [gptqmodel_python, "-P", "-c", RUN, str(ROOT / "qat/runtimes"), json.dumps(folders)]
    command += [str(tmp_path / "prompts"), str(tmp_path / "got")]
    eager = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=eager)
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "got")
    for name, (model, frozen) in models.items():
        rounded = {n: w.dequantize().half() for n, w in frozen.weights.items()}
        for weight, want in rounded.items():
            assert torch.equal(got[f"{name}/{weight}"], want), (name, weight)
        other = tiny("gpt2", tie_word_embeddings=tied)
        other.load_state_dict({**frozen.state_dict(), **{n: t.float() for n, t in rounded.items()}})
        have = [got[f"{name}/{i}"] for i in range(5)]
        assert differences(have, logits(other)).max() <= 2e-6, name
        assert differences(have, logits(model)).max() <= (2e-6 if "symmetric" in name else 5e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_text_is_generated_by_gptqmodel(target: str, gptqmodel_python: str, tmp_path: Path) -> None:
    model, frozen = trained("gpt2", rules("int4_g128_linear"))
    made, end = byte_level_tokenizer(), "<|endoftext|>"
    files = tokenizer_files(made, bos_token=end, eos_token=end, unk_token=end)
    path = export(dataclasses.replace(frozen, tokenizer=files), target, tmp_path / "out")
    ids = torch.tensor([made.encode("def f").ids])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    request = json.dumps({"prompt": "def f", "n_predict": 8, "temperature": 0.0, "seed": 0})
    answer = run("transformers_folder", path, complete=request, version="")
    assert answer["complete"] == made.decode(want[0, ids.shape[1] :].tolist())
    assert "gptqmodel 7" in answer["version"]
    (line,) = (x for x in card(frozen, target, **UNTITLED).splitlines() if x.startswith("python -c"))
    command = line.removeprefix("python -c ").strip('"')
    done = subprocess.run([gptqmodel_python, "-c", command], cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GPT2" in done.stdout
