"""The mlx target: MLX's own dequantization and quantizer, and the whole model in mlx-lm's Linux CPU build."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peer_logits import PROMPTS, differences, rules, trained
from prepared_models import ALL, INT4, ZERO, rule, tiny
from safetensors.torch import load_file, save_file
from tiny_text_models import byte_level_tokenizer, tokenizer_files

from qat.affine import choose_qparams, dequantize, quantize
from qat.auditing import audit
from qat.errors import UserError, VerifyError
from qat.exporters import export, identify, mlx
from qat.runtimes import run
from qat.scheme import QuantSpec, Rule
from qat.verification import verify


def affine(bits: int, group: int = 32, dtype: str = "portable") -> QuantSpec:
    return QuantSpec(qtype=f"uint{bits}", block=(1, group), range="mlx", scale=dtype, offset=dtype)


EMBEDDING = ".*(wte|embed_tokens|lm_head)"
GRIDS: dict[str, tuple[str, list[Rule]]] = {
    "the scheme": ("llama", rules("mlx_int4_g64")),
    "symmetric, gpt2": ("gpt2", ALL),
    "symmetric, negative": ("qwen2", ALL),
    "float embedding": ("mistral", [rule(None, "lm_head"), rule(affine(6))]),
    "mixed": (
        "qwen3",
        [
            rule(affine(8, 64), EMBEDDING, ".*"),
            rule(affine(2), ".*q_proj"),
            rule(affine(3), ".*k_proj"),
            rule(affine(5), ".*(gate|v)_proj"),
            rule(QuantSpec(qtype="int6", block=(1, 32)), ".*up_proj"),
            rule(None, ".*o_proj"),
            rule(INT4),
        ],
    ),
}


ROPES = {
    "rope theta": {"rope_type": "default", "rope_theta": 300.0},
    "llama 3 rope": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def decoded(stored: dict[str, torch.Tensor], module: str, grid: dict[str, int]) -> np.ndarray:
    """(out, in) float32 by MLX's description: bits of each code in one little-endian stream a row."""
    raw = stored[f"{module}.weight"].view(torch.int32).numpy().view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little").reshape(raw.shape[0], -1, grid["bits"])
    codes = (stream * (1 << np.arange(grid["bits"]))).sum(-1).astype(np.float32)
    scale, bias = (
        np.repeat(stored[f"{module}.{k}"].float().numpy(), grid["group_size"], 1) for k in ("scales", "biases")
    )
    return codes * scale + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_another_decoder_gives_our_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, scheme = GRIDS[name]
    _, frozen = trained(kind, scheme, dtype)
    path = export(frozen, "mlx", tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    grids = json.loads((path / "config.json").read_text())["quantization"]
    for weight, w in frozen.weights.items():
        module = weight.removesuffix(".weight").replace("transformer.", "model.")
        want = w.dequantize().t() if w.kind == "Conv1D" else w.dequantize()
        assert np.array_equal(decoded(stored, module, grids.get(module, grids)), want.numpy()), weight
    back = mlx.read(path)
    assert back.digests() == frozen.digests()
    assert {n: (w.kind, w.shape, w.tensor.spec) for n, w in back.weights.items()} == {
        n: (w.kind, w.shape, w.tensor.spec) for n, w in frozen.weights.items()
    }
    assert back.ties == frozen.ties
    frozen.save(tmp_path / "frozen")
    (path / "manifest.json").unlink()
    assert not verify(path, against=tmp_path / "frozen", runtime=False).differences


REFUSED: dict[str, tuple[str, list[Rule]]] = {
    "int6 is the nearest": ("llama", [rule(QuantSpec(qtype="int7", block=(1, 32)))]),
    r"\(1, 32\) is the nearest": ("llama", [rule(QuantSpec(qtype="int4", block=(1, 16)))]),
    r"block \(1, -1\) does not fit": ("llama", [rule(QuantSpec(qtype="int8"))]),
    "range mlx with a floating offset": ("llama", [rule(ZERO)]),
    "silu in the place of gelu": ("gelu", [rule(INT4)]),
    "not tried with bert": ("bert", [rule(INT4)]),
    "float inputs": ("llama", [rule(INT4, input=QuantSpec(qtype="int8", scale="float32"))]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_at_the_audit_and_at_the_export(why: str, tmp_path: Path) -> None:
    kind, scheme = REFUSED[why]
    model = tiny("llama", hidden_act="gelu") if kind == "gelu" else tiny(kind)
    with pytest.raises(UserError, match=why):
        audit(model, scheme, targets=["mlx"], config=model.config.to_dict())
    if kind not in ("bert", "gelu"):
        with pytest.raises(UserError, match=why):
            export(trained(kind, scheme)[1], "mlx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_do_not_fit_the_models_dtype(tmp_path: Path) -> None:
    _, frozen = trained("llama", [rule(affine(4, dtype="float32"))], torch.bfloat16)
    with pytest.raises(UserError, match=r"lm_head\.weight has scales or biases that torch\.bfloat16 cannot hold|proj"):
        export(frozen, "mlx", tmp_path / "out")


def test_damage_is_named(tmp_path: Path) -> None:
    _, frozen = trained("llama", [rule(None, "lm_head"), rule(affine(4))])
    frozen.save(tmp_path / "frozen")
    path = export(frozen, "mlx", tmp_path / "out")
    (path / "manifest.json").unlink()
    assert identify(path) == ("mlx", None)
    stored = load_file(path / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    for key, said in (("scales", "stored scales differ"), ("biases", "stored offsets differ")):
        moved = stored[f"{module}.{key}"].nextafter(torch.tensor(9.0))
        save_file({**stored, f"{module}.{key}": moved}, path / "model.safetensors")
        assert said in verify(path, against=tmp_path / "frozen", runtime=False).differences[0]
    save_file({n: t for n, t in stored.items() if n != f"{module}.biases"}, path / "model.safetensors")
    with pytest.raises(VerifyError, match=module):
        mlx.read(path)


MLX = """
import json, sys, mlx.core as mx
from mlx_lm.utils import load_model
import mlx.nn as nn
from pathlib import Path
mx.set_default_device(mx.cpu)
prompts, out = mx.load(sys.argv[2]), {}
for name, folder in json.loads(sys.argv[1]).items():
    model, config = load_model(Path(folder))
    for path, m in model.named_modules():
        if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            values = mx.dequantize(m.weight, m.scales, m.biases, m.group_size, m.bits)
            out[f"{name}/{path}.weight"] = values.astype(mx.float32)
    for i, ids in prompts.items():
        out[f"{name}/{i}"] = model(ids[None])[0].astype(mx.float32)
x = mx.load(sys.argv[4])["x"]
for bits in (2, 3, 4, 5, 6, 8):
    for group in (32, 64, 128):
        for part, t in zip(("weight", "scales", "biases"), mx.quantize(x, group, bits)):
            out[f"quantize {bits} {group} {part}"] = t
mx.save_safetensors(sys.argv[3], out)
assert "qat" not in sys.modules
"""


@pytest.fixture(scope="module")
def ran(mlx_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MLX makes of the folders, in its own environment."""
    import subprocess

    root = tmp_path_factory.mktemp("mlx")
    models = {n: trained(*g) for n, g in GRIDS.items()}
    for name, rope in ROPES.items():
        models[name] = trained("llama", [rule(INT4)], rope_parameters=rope)
    models["bfloat16"] = trained("llama", [rule(affine(4), ".*", "Linear|Embedding")], torch.bfloat16)
    folders = {n: export(frozen, "mlx", root / n) for n, (_, frozen) in models.items()}
    torch.manual_seed(0)
    x = torch.randn(24, 256) + 0.2
    save_file({str(i): ids for i, ids in enumerate(PROMPTS[:5])}, root / "prompts.safetensors")
    save_file({"x": x}, root / "x.safetensors")
    asked = json.dumps({n: str(p) for n, p in folders.items()})
    names = [str(root / f"{n}.safetensors") for n in ("prompts", "got", "x")]
    done = subprocess.run([mlx_python, "-P", "-c", MLX, asked, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"models": models, "folders": folders, "got": load_file(root / "got.safetensors"), "x": x}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRIDS, *ROPES])
def test_mlx_computes_what_was_trained(name: str, ran: dict[str, Any]) -> None:
    model, frozen = ran["models"][name]
    for weight, w in frozen.weights.items():
        have = ran["got"][f"{name}/{weight.replace('transformer.', 'model.')}"]
        assert torch.equal(have.t() if w.kind == "Conv1D" else have, w.dequantize()), weight
    with torch.no_grad():
        want = [model(ids[None]).logits[0] for ids in PROMPTS[:5]]
    assert differences([ran["got"][f"{name}/{i}"] for i in range(5)], want).max() <= 2e-6


@pytest.mark.slow
def test_bfloat16(ran: dict[str, Any]) -> None:
    """Weights within one rounding of code * scale in bfloat16, and so the logits within its noise."""
    model, frozen = ran["models"]["bfloat16"]
    for weight, w in frozen.weights.items():
        have = ran["got"][f"bfloat16/{weight}"]
        assert (have - w.dequantize()).abs().max() <= 2**-7 * w.dequantize().abs().max()
    with torch.no_grad():
        want = [model(ids[None]).logits[0].float() for ids in PROMPTS[:5]]
    assert differences([ran["got"][f"bfloat16/{i}"] for i in range(5)], want).max() <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_range_mlx_is_its_own_quantizer(bits: int, group: int, ran: dict[str, Any]) -> None:
    spec = affine(bits, group, "float32")
    q = quantize(ran["x"], choose_qparams(ran["x"], spec), spec)
    assert torch.equal(q.scale, ran["got"][f"quantize {bits} {group} scales"])
    assert torch.equal(q.offset, ran["got"][f"quantize {bits} {group} biases"])
    grid = {"bits": bits, "group_size": group}
    stored = {f"m.{k}": ran["got"][f"quantize {bits} {group} {k}"] for k in ("weight", "scales", "biases")}
    assert np.array_equal(decoded(stored, "m", grid), dequantize(q).numpy())


@pytest.mark.slow
def test_the_runtime(ran: dict[str, Any]) -> None:
    model, _ = ran["models"]["the scheme"]
    ids = torch.stack([p[:8] for p in PROMPTS[:3]])
    answer = run("mlx", ran["folders"]["the scheme"], logprobs=[PROMPTS[0].tolist()], score=ids, version="")
    with torch.no_grad():
        want = model(ids).logits.log_softmax(-1)
        last = model(PROMPTS[:1][0][None]).logits[:, -1].log_softmax(-1)
    assert (answer["score"] - want[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)).abs().max() <= 2e-5
    assert (answer["logprobs"] - last).abs().max() <= 2e-5
    assert answer["version"].startswith("mlx 0.")


@pytest.mark.slow
def test_text_is_generated_in_mlx(tmp_path: Path) -> None:
    model, frozen = trained("llama", [rule(INT4)])
    end = "<|endoftext|>"
    made = byte_level_tokenizer()
    files = tokenizer_files(made, bos_token=end, eos_token=end, unk_token=end)
    path = export(dataclasses.replace(frozen, tokenizer=files), "mlx", tmp_path / "out")
    ids = torch.tensor([made.encode("def f").ids])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
    request = {"prompt": "def f", "n_predict": 8, "temperature": 0.0, "seed": 0}
    assert run("mlx", path, complete=json.dumps(request))["complete"] == made.decode(want[0, ids.shape[1] :].tolist())
    assert run("mlx", path, complete=json.dumps({**request, "temperature": 1.0}))["complete"]
    with pytest.raises(UserError, match="more than the 64 positions"):
        run("mlx", path, complete=json.dumps({**request, "n_predict": 80}))
