"""Checkpoints written by other tools' own code, carried to other targets: every value the same, or refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from foreign_checkpoints import PARTS, Q4_K_M, SHAPE, compressed, gptq, llama_gguf, tokenizer
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file
from tiny_text_models import tiny

from qat.cli import main
from qat.exporters import read_any
from qat.rescue import source
from qat.runtimes import run
from qat.verification import verify

NO_RUN = ["--no-verify"]
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}


def export(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """`qat export` in this process: (exit code, all that it printed)."""
    code = main(["export", *(str(w) for w in words)])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    "kind", [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K, T.TQ2_0], ids=lambda kind: kind.name
)
def test_a_gguf_file_becomes_a_hugging_face_folder(kind: T, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = WIDE if kind.name.endswith("_K") or kind == T.TQ2_0 else {}
    worth = llama_gguf(tmp_path / "x.gguf", kind, **wide)
    proven = [] if kind == T.Q4_0 else NO_RUN  # in transformers, and the tokenizer in llama.cpp too
    code, said = export(capsys, tmp_path / "x.gguf", "--to", "hf", "--out", tmp_path / "out", *proven)
    assert code == 0, said
    assert proven or "tokenizer equal on 8 lines" in said
    assert not verify(tmp_path / "out" / "hf", against=tmp_path / "x.gguf", runtime=False).differences
    back = source(tmp_path / "out" / "hf")
    assert {**back.weights}.keys() == {n for n in worth if "proj" in n or "head" in n}
    values = back.state_dict()
    assert values.keys() == worth.keys()
    assert all(torch.equal(values[n].float(), worth[n]) for n in worth)
    assert back.config["model_type"] == "llama"
    assert back.config["rms_norm_eps"] == 1e-6
    assert back.config["num_key_value_heads"] == 2


def test_q4_k_m_becomes_a_folder_and_a_gguf_file_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mix that most GGUF files are, quantized by ggml: the tensors of the second file are those of the first."""
    worth = llama_gguf(tmp_path / "x.gguf", T.Q4_K, mix={**Q4_K_M, "embed_tokens.weight": T.Q4_K}, **WIDE)
    code, said = export(capsys, tmp_path / "x.gguf", "--to", "hf,gguf", "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    values = source(tmp_path / "out" / "hf").state_dict()
    assert values.keys() == worth.keys()
    assert all(torch.equal(values[n], worth[n]) for n in worth)
    want, have = (gguf.GGUFReader(f).tensors for f in (tmp_path / "x.gguf", tmp_path / "out" / "gguf" / "model.gguf"))
    stored = {t.name: t for t in have}
    for t in want:
        assert stored[t.name].tensor_type == t.tensor_type
        assert stored[t.name].data.tobytes() == t.data.tobytes(), t.name
    again = export(capsys, tmp_path / "out" / "hf", "--to", "gguf", "--out", tmp_path / "again")
    assert again[0] == 0, again[1]
    assert "tokenizer equal on 8 lines" in again[1]
    ids = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    a, b = (run("llama_cpp", f, score=ids)["score"] for f in (tmp_path / "x.gguf", tmp_path / "again" / "gguf"))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "target", "moved"),
    [
        (T.Q6_K, "onnx", "as int8 (1, 16) absmax float32, every value the same"),
        (T.Q4_K, "mlx", "as uint4 (1, 32) minmax float32 +float32, every value the same"),
    ],
)
def test_two_levels_of_scales_become_one(
    kind: T, target: str, moved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worth = llama_gguf(tmp_path / "x.gguf", kind, **WIDE)
    code, said = export(capsys, tmp_path / "x.gguf", "--to", target, "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    assert moved in said
    assert not verify(tmp_path / "out" / target, against=tmp_path / "x.gguf", runtime=False).differences
    values = read_any(tmp_path / "out" / target).state_dict()
    assert all(torch.equal(values[n].float(), worth[n]) for n in worth)


def test_compressed_tensors_runs_in_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    worth = compressed(tmp_path / "ct", args, torch.float16)
    code, said = export(capsys, tmp_path / "ct", "--to", "gguf", "--out", tmp_path / "out")
    assert code == 0, said
    assert "tokenizer equal" in said
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "gguf" / "model.gguf").tensors}
    assert read["blk.0.ffn_up.weight"].tensor_type == T.Q4_0
    up = gguf.dequantize(read["blk.0.ffn_up.weight"].data, T.Q4_0)
    frozen = source(tmp_path / "ct")
    want = frozen.state_dict()
    assert torch.equal(torch.from_numpy(up), want["model.layers.0.mlp.up_proj.weight"])
    assert all(torch.equal(want[n].half().float(), worth[n]) for n in want)
    model = tiny("llama", **SHAPE)
    model.load_state_dict(want)
    ids = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    scored = run("llama_cpp", tmp_path / "out" / "gguf", score=ids)["score"]
    spread = float(logits.std())
    assert float((scored[0] - logits).abs().max()) < 0.1 * spread  # llama.cpp quantizes the inputs to int8


@pytest.mark.parametrize(("version", "symmetric", "kind"), [(1, True, T.Q4_0), (2, True, T.Q4_0), (1, False, T.Q5_0)])
def test_gptq_becomes_gguf(
    version: int, symmetric: bool, kind: T, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups of 64 are cut in two; zero points are taken off the codes, which then need a fifth bit."""
    worth = gptq(tmp_path / "gptq", version, symmetric)
    out = tmp_path / "out"
    code, said = export(capsys, tmp_path / "gptq", "--to", "gguf", "--out", out, *([] if version == 2 else NO_RUN))
    assert code == 0, said
    assert "every value the same" in said
    read = {t.name: t for t in gguf.GGUFReader(out / "gguf" / "model.gguf").tensors}
    assert read["blk.1.ffn_down.weight"].tensor_type == kind
    down = gguf.dequantize(read["blk.1.ffn_down.weight"].data, kind)
    assert torch.equal(torch.from_numpy(down), worth["model.layers.1.mlp.down_proj.weight"])
    assert not verify(out / "gguf", against=tmp_path / "gptq", runtime=False).differences
    back = read_any(out / "gguf").state_dict()
    assert all(torch.equal(back[n], worth[n].float()) for n in worth)


def test_gptq_becomes_a_folder_that_compressed_tensors_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worth = gptq(tmp_path / "gptq", 1, symmetric=False)
    code, said = export(capsys, tmp_path / "gptq", "--to", "hf", "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    stored = load_file(tmp_path / "out" / "hf" / "model.safetensors")
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    name = "model.layers.0.mlp.down_proj.weight"
    parts = {k: stored[f"{name}{k.removeprefix('weight')}"] for k in PARTS}
    back = PackedQuantizationCompressor.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)
    assert torch.equal(back["weight"], worth[name])


def test_zero_points_become_the_next_grid_that_mlx_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MLX's biases lie in the model's float16, which has not every scale times zero point: int5 has no such bias."""
    worth = gptq(tmp_path / "gptq", 1, symmetric=False)
    code, said = export(capsys, tmp_path / "gptq", "--to", "mlx", "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    assert "as int5 (1, 64) absmax float16, every value the same" in said
    back = source(tmp_path / "out" / "mlx").state_dict()
    assert all(torch.equal(back[n], worth[n].float()) for n in worth)
    assert not verify(tmp_path / "out" / "mlx", against=tmp_path / "gptq", runtime=False).differences


def test_autogptqs_own_file_names(tmp_path: Path) -> None:
    worth = gptq(tmp_path / "gptq", 1, symmetric=True)
    (tmp_path / "gptq" / "model.safetensors").rename(tmp_path / "gptq" / "gptq_model-4bit-64g.safetensors")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    how = config.pop("quantization_config")
    del how["quant_method"]
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    (tmp_path / "gptq" / "quantize_config.json").write_text(json.dumps(how))
    frozen = source(tmp_path / "gptq")
    assert all(torch.equal(value.float(), worth[n].float()) for n, value in frozen.state_dict().items())
    assert "quantize_config.json" not in frozen.tokenizer


def test_two_gguf_files_are_compared_with_their_tokenizers(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "a.gguf", T.Q4_0)
    llama_gguf(tmp_path / "b.gguf", T.Q4_0)
    assert not verify(tmp_path / "a.gguf", against=tmp_path / "b.gguf", runtime=False).differences
    field = gguf.GGUFReader(tmp_path / "a.gguf", "r+").fields["tokenizer.ggml.tokens"]
    field.parts[field.data[300]][:1] = ord("Z")
    field.parts[field.data[300]].base.flush()
    (said,) = verify(tmp_path / "a.gguf", against=tmp_path / "b.gguf", runtime=False).differences
    assert said.startswith("the tokenizer differs: tokenizer.ggml.tokens")


def test_act_order_is_refused_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gptq(tmp_path / "gptq", 2, symmetric=True)
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.g_idx"
    save_file({**stored, key: stored[key].flip(0)}, tmp_path / "gptq" / "model.safetensors")
    code, said = export(capsys, tmp_path / "gptq", "--to", "gguf", "--out", tmp_path / "out")
    assert code == 3
    assert "but desc_act is false" in said
    config = tmp_path / "gptq" / "config.json"
    config.write_text(config.read_text().replace('"desc_act": false', '"desc_act": true'))
    code, said = export(capsys, tmp_path / "gptq", "--to", "gguf", "--out", tmp_path / "out")
    assert code == 2
    assert "model.layers.0.mlp.down_proj.weight" in said
    assert "desc_act" in said


def test_unknown_ggml_types_and_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    code, said = export(capsys, tmp_path / "mamba.gguf", "--to", "hf", "--out", tmp_path / "out")
    assert code == 2
    assert "mamba" in said
    llama_gguf(tmp_path / "x.gguf", T.TQ1_0, **WIDE)
    code, said = export(capsys, tmp_path / "x.gguf", "--to", "hf", "--out", tmp_path / "out")
    assert code == 2
    assert "is TQ1_0; types that can be read: Q4_0, Q4_1" in said
    assert not (tmp_path / "out" / "hf").exists()


def test_torchaos_float32_scales_are_refused_for_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from transformers import TorchAoConfig

    model = tiny("llama", **SHAPE)
    chosen = quantization.Int8WeightOnlyConfig(version=2)
    quantization.quantize_(model.model, chosen)
    stored, metadata = support.flatten_tensor_state_dict(model.state_dict())
    folder = tmp_path / "torchao"
    model.config.quantization_config = TorchAoConfig(chosen, modules_to_not_convert=["lm_head"])
    model.config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", {**metadata})
    for name, content in tokenizer().items():
        (folder / name).write_bytes(content)
    code, said = export(capsys, folder, "--to", "gguf", "--out", tmp_path / "out")
    assert code == 2
    assert "q_proj.weight" in said
    assert "the nearest GGUF grid is Q8_0" in said
    assert "No grid of this target holds the same weights exactly" in said
    code, said = export(capsys, folder, "--to", "hf", "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    values = source(tmp_path / "out" / "hf").state_dict()
    for name, p in model.state_dict().items():
        assert torch.equal(values[name], p.dequantize() if hasattr(p, "qdata") else p)


def test_a_file_against_the_float_model_it_was_made_of(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "x.gguf", T.Q8_0)
    model = tiny("llama", **SHAPE)
    model.save_pretrained(tmp_path / "float")
    verdict = verify(tmp_path / "x.gguf", against=tmp_path / "float", runtime=False)
    assert verdict.differences == []
    assert 40 < verdict.figures["worst_sqnr"] <= verdict.figures["mean_sqnr"] < 60  # 6.02 dB a bit
    with torch.no_grad():
        up = model.model.layers[1].mlp.up_proj.weight
        up.copy_(up[torch.randperm(len(up))])
    model.save_pretrained(tmp_path / "other")
    differences = verify(tmp_path / "x.gguf", against=tmp_path / "other", runtime=False).differences
    assert len(differences) == 1
    assert differences[0].startswith("model.layers.1.mlp.up_proj.weight is not the original's, rounded (-")


def test_a_llama_with_biases(tmp_path: Path) -> None:
    worth = llama_gguf(tmp_path / "x.gguf", T.Q4_0, attention_bias=True)
    frozen = source(tmp_path / "x.gguf")
    assert frozen.config["attention_bias"] is True
    assert all(torch.equal(value.float(), worth[n]) for n, value in frozen.state_dict().items())


def test_a_mistral_reads_as_the_llama_that_llama_cpp_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GGUF has one name for both, and no sliding window for either; transformers computes the same for both."""
    worth = llama_gguf(tmp_path / "x.gguf", T.Q4_0)
    code, said = export(capsys, tmp_path / "x.gguf", "--to", "hf", "--out", tmp_path / "out", *NO_RUN)
    assert code == 0, said
    config = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    logits = []
    ids = torch.randint(2, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    for kind, changes in (("llama", {}), ("mistral", {"sliding_window": None})):
        model = tiny(kind, **{**SHAPE, **changes})
        model.load_state_dict(worth)
        with torch.no_grad():
            logits.append(model(ids).logits)
        changed = {**config, "model_type": kind, **changes}
        (tmp_path / "out" / "hf" / "config.json").write_text(json.dumps(changed))
        (tmp_path / "out" / "hf" / "manifest.json").unlink(missing_ok=True)
        for a, b in ((tmp_path / "x.gguf", tmp_path / "out" / "hf"), (tmp_path / "out" / "hf", tmp_path / "x.gguf")):
            assert verify(a, against=b, runtime=False).differences == []
    assert torch.equal(*logits)
