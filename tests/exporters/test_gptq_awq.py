"""GPTQ and AWQ folders: an independent numpy decoder, gptqmodel's own, and transformers' reload in its environment."""

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
from prepared_models import INT4, NEGATIVE, ZERO, rule, tiny
from safetensors.torch import load_file, save_file
from tiny_text_models import byte_level_tokenizer, tokenizer_files
from torch import Tensor

from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import export, identify, target_module
from qat.frozen import Frozen
from qat.runtimes import run
from qat.scheme import QuantSpec, Rule
from qat.verification import verify

HEAD = rule(None, "lm_head")
SIGNED = QuantSpec(qtype="int4", block=(1, 16), range="minmax", offset="zero_point", scale="float16")
GRIDS: dict[str, tuple[str, list[Rule]]] = {
    "symmetric": ("gptq", rules("int4_g128_linear")),
    "negative scales, v1": ("gptq_v1", [HEAD, rule(NEGATIVE)]),
    "int8 channel": ("gptq", rules("w8a16")),
    "zero points": ("gptq", rules("int4_g128_asymmetric")),
    "unsigned, left": ("gptq", [rule(None, ".*(lm_head|k_proj)"), rule(ZERO)]),
    "int2": ("gptq", [HEAD, rule(QuantSpec(qtype="uint2", block=(1, 32), range="minmax", offset="zero_point"))]),
    "awq": ("awq", rules("int4_g128_asymmetric")),
    "awq symmetric, left": ("awq", [rule(None, ".*(lm_head|k_proj)"), rule(INT4)]),
    "awq groups of 16": ("awq", [HEAD, rule(SIGNED)]),
}


def nibbles(words: Tensor, bits: int) -> np.ndarray:
    """int32 words (R, C) -> codes (R, C * 32 / bits), lowest bits first."""
    raw = words.numpy().view(np.uint32)
    return np.stack([(raw >> np.uint32(i)) & np.uint32(2**bits - 1) for i in range(0, 32, bits)], -1).reshape(
        raw.shape[0], -1
    )


def decoded(stored: dict[str, Tensor], module: str, config: dict[str, Any]) -> np.ndarray:
    """(out, in) float32, by the formats' descriptions: w = (q - z) * s."""
    qweight, qzeros = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
    scales = stored[f"{module}.scales"].float().numpy()
    bits = config["bits"]
    if config["quant_method"] == "awq":
        order = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # where column i of eight lies
        codes, zeros = (
            nibbles(w, 4).reshape(w.shape[0], -1, 8)[..., order].reshape(w.shape[0], -1) for w in (qweight, qzeros)
        )
        group = np.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    else:
        codes, zeros = nibbles(qweight.t().contiguous(), bits).T, nibbles(qzeros, bits)
        zeros = zeros + (config["checkpoint_format"] == "gptq")
        group = stored[f"{module}.g_idx"].numpy()
    return ((codes.astype(np.int64) - zeros[group].astype(np.int64)) * scales[group]).astype(np.float32).T


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16)])
@pytest.mark.parametrize("name", GRIDS)
def test_another_decoder_gives_our_weights(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    target, scheme = GRIDS[name]
    _, frozen = trained(kind, scheme, dtype)
    path = export(frozen, target, tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for weight, w in frozen.weights.items():
        assert np.array_equal(decoded(stored, weight.removesuffix(".weight"), config), w.dequantize().numpy())
    back = target_module(target).read(path)
    assert back.digests() == frozen.digests()
    assert back.ties == frozen.ties
    frozen.save(tmp_path / "frozen")
    (path / "manifest.json").unlink()
    assert not verify(path, against=tmp_path / "frozen", runtime=False).differences
    w = frozen.weights["model.layers.0.self_attn.q_proj.weight"].tensor
    if w.offset is not None:
        assert (w.offset[0] == w.spec.type.qmin).all()
        assert (w.offset[1] == w.spec.type.qmax).all()


REFUSED: dict[str, tuple[str, str, list[Rule]]] = {
    "int4 does": ("gptq", "llama", [rule(QuantSpec(qtype="int5", block=(1, 32)))]),
    "int2 does": ("gptq", "llama", [rule(QuantSpec(qtype="int3", block=(1, 32)))]),
    "8 bits do not fit awq, which has 4; int4 does": ("awq", "llama", [rule(QuantSpec(qtype="int8"))]),
    r"\(1, 32\) is the nearest": ("awq", "llama", [rule(QuantSpec(qtype="int4", block=(2, 32)))]),
    r"\(1, 16\) is the nearest": ("gptq", "llama", [rule(QuantSpec(qtype="int4", block=(1, 8)))]),
    "stored in float16": ("gptq", "llama", [rule(QuantSpec(qtype="int4", block=(1, 32), scale="float32"))]),
    "symmetric or with a zero": ("awq", "llama", [rule(QuantSpec(qtype="uint4", range="mlx", offset="float16"))]),
    "zero point of 0": ("gptq_v1", "llama", [HEAD, rule(ZERO)]),
    "the format has one grid": ("gptq", "llama", [rule(INT4, ".*q_proj"), rule(QuantSpec(qtype="int8"), ".*layers.*")]),
    r"GPTQ layers in .*model\.layers alone": ("gptq", "llama", [rule(INT4, "lm_head")]),
    "takes? float inputs": ("awq", "llama", [rule(INT4, input=QuantSpec(qtype="int8", scale="float32"))]),
}


def test_version_1_holds_zero_points_from_1_on(tmp_path: Path) -> None:
    """Which there are is known when codes are: training for it is refused, carrying another file over is not."""
    _, frozen = trained("llama", GRIDS["unsigned, left"][1])
    raised = {}
    for name, w in frozen.weights.items():
        assert w.tensor.offset is not None
        offset = w.tensor.offset.clamp(min=w.tensor.spec.type.qmin + 1)
        raised[name] = dataclasses.replace(w, tensor=dataclasses.replace(w.tensor, offset=offset))
    path = export(dataclasses.replace(frozen, weights=raised), "gptq_v1", tmp_path / "v1")
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    for name, w in raised.items():
        assert np.array_equal(decoded(stored, name.removesuffix(".weight"), config), w.dequantize().numpy())


@pytest.mark.parametrize("why", REFUSED)
def test_refused_at_the_audit_and_at_the_export(why: str, tmp_path: Path) -> None:
    target, kind, scheme = REFUSED[why]
    model = tiny(kind)
    with pytest.raises(UserError, match=why):
        audit(model, scheme, targets=[target], config=model.config.to_dict())
    with pytest.raises(UserError, match=why):
        export(trained(kind, scheme)[1], target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_must_be_whole(tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=92)
    with pytest.raises(UserError, match="multiples of 8"):
        audit(model, [HEAD, rule(QuantSpec(qtype="int4"))], targets=["awq"], config=model.config.to_dict())


def test_damage_is_named(tmp_path: Path) -> None:
    _, frozen = trained("llama", rules("int4_g128_linear"))
    frozen.save(tmp_path / "frozen")
    path = export(frozen, "gptq", tmp_path / "out")
    (path / "manifest.json").unlink()
    assert identify(path) == ("gptq", None)
    stored = load_file(path / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    for key, change, said in (
        ("qweight", lambda t: (t >> 4) & 0x0F0F0F0F | (t & 0x0F0F0F0F) << 4, "nibbles of every byte are swapped"),
        ("scales", lambda t: t.nextafter(torch.tensor(9.0, dtype=t.dtype)), "scales differ"),
        ("qzeros", lambda t: t + 1, "one has a zero point"),
    ):
        save_file({**stored, f"{module}.{key}": change(stored[f"{module}.{key}"])}, path / "model.safetensors")
        assert said in verify(path, against=tmp_path / "frozen", runtime=False).differences[0]
    save_file({**stored, f"{module}.g_idx": stored[f"{module}.g_idx"].flip(0)}, path / "model.safetensors")
    with pytest.raises(VerifyError, match=module):
        verify(path, against=tmp_path / "frozen", runtime=False)


RUN = """
import json, sys, torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from plain_transformers import load
del sys.path[0]  # gptqmodel would find our mlx.py
prompts, out = load_file(sys.argv[3]), {}
for name, folder in json.loads(sys.argv[2]).items():
    model = load(folder)
    for path, module in model.named_modules():
        if hasattr(module, "awq_weight_dequantize"):  # the only one that its kernels for any CPU have
            out[f"{name}/{path}.weight"] = module.awq_weight_dequantize("cpu", torch.float16).t().contiguous()
        elif hasattr(module, "dequantize_weight"):
            out[f"{name}/{path}.weight"] = module.dequantize_weight().t().contiguous()
    with torch.no_grad():
        out |= {f"{name}/{i}": model(ids[None]).logits[0].float() for i, ids in prompts.items()}
assert "qat" not in sys.modules
save_file(out, sys.argv[4])
"""


@pytest.mark.slow
def test_gptqmodel_computes_what_was_trained(gptqmodel_python: str, tmp_path: Path) -> None:
    """Its own dequantized weights are ours rounded once to float16, and the logits those of a model with these."""
    names = ["symmetric", "negative scales, v1", "int8 channel", "zero points", "awq", "awq symmetric, left"]
    models: dict[str, tuple[Any, Frozen]] = {n: trained("llama", GRIDS[n][1]) for n in names}
    folders = {n: str(export(models[n][1], GRIDS[n][0], tmp_path / n)) for n in names}
    save_file({str(i): ids for i, ids in enumerate(PROMPTS[:5])}, tmp_path / "prompts")
    command = [gptqmodel_python, "-P", "-c", RUN, str(ROOT / "qat/runtimes"), json.dumps(folders)]
    command += [str(tmp_path / "prompts"), str(tmp_path / "got")]
    eager = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # gptqmodel compiles its kernels for minutes
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=eager)
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "got")
    for name, (model, frozen) in models.items():
        rounded = {n: w.dequantize().half() for n, w in frozen.weights.items()}
        for weight, want in rounded.items():
            assert torch.equal(got[f"{name}/{weight}"], want), (name, weight)
        other = tiny("llama", tie_word_embeddings=False)
        other.load_state_dict({**frozen.state_dict(), **{n: t.float() for n, t in rounded.items()}})
        have = [got[f"{name}/{i}"] for i in range(5)]
        assert differences(have, logits(other)).max() <= 2e-6, name
        exact = all(torch.equal(rounded[n].float(), w.dequantize()) for n, w in frozen.weights.items())
        assert exact == ("symmetric" in name or "v1" in name)  # four-bit codes times portable scales fit float16
        assert differences(have, logits(model)).max() <= (2e-6 if exact else 5e-3), name
        assert bool(target_module(GRIDS[name][0]).caveats(frozen)) == (not exact)
    answer = run("transformers_folder", Path(folders["symmetric"]), logprobs=[PROMPTS[0].tolist()], version="")
    assert "gptqmodel 7" in answer["version"]
    want = logits(models["symmetric"][0], 1)[0][-1].log_softmax(-1)
    assert (answer["logprobs"][0] - want).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("gptqmodel_python")
@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_text_is_generated_by_gptqmodel(target: str, tmp_path: Path) -> None:
    model, frozen = trained("llama", GRIDS["symmetric"][1])  # whose weights float16 holds
    made, end = byte_level_tokenizer(), "<|endoftext|>"
    files = tokenizer_files(made, bos_token=end, eos_token=end, unk_token=end)
    path = export(dataclasses.replace(frozen, tokenizer=files), target, tmp_path / "out")
    ids = torch.tensor([made.encode("def f").ids])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    request = {"prompt": "def f", "n_predict": 8, "temperature": 0.0, "seed": 0}
    got = run("transformers_folder", path, complete=json.dumps(request))["complete"]
    assert got == made.decode(want[0, ids.shape[1] :].tolist())
    with pytest.raises(UserError, match="more than the 64 positions"):
        run("transformers_folder", path, complete=json.dumps({**request, "n_predict": 80}))
