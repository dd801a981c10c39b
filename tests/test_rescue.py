"""Checkpoints written by other tools' own code, carried to other targets: every value the same, or refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file
from tiny_text_models import byte_level_tokenizer, tiny, tokenizer_files

from qat.affine import choose_qparams
from qat.cli import main
from qat.rescue import source
from qat.scheme import QuantSpec

SHAPE: dict[str, Any] = {"tie_word_embeddings": False, "intermediate_size": 128}


def tokenizer() -> dict[str, bytes]:
    end = "<|endoftext|>"
    return tokenizer_files(byte_level_tokenizer("smaug-bpe"), bos_token=end, eos_token=end, unk_token=end)


def export(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """`qat export` in this process: (exit code, all that it printed)."""
    code = main(["export", *(str(w) for w in words)])
    said = capsys.readouterr()
    return code, said.out + said.err


def llama_gguf(file: Path, kind: T, **changes: Any) -> dict[str, torch.Tensor]:
    """A Llama written by gguf-py alone as llama.cpp's converter does; what its tensors are worth, by HF name."""
    model = tiny("llama", **{**SHAPE, **changes})
    c = model.config
    w = gguf.GGUFWriter(file, "llama")
    w.add_name("someone's")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(c.head_dim)
    spec = json.loads(tokenizer()["tokenizer.json"])
    words = sorted(spec["model"]["vocab"], key=lambda t: spec["model"]["vocab"][t])
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smaug-bpe")
    w.add_token_list(words)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in words])
    w.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    w.add_add_bos_token(False)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    worth: dict[str, torch.Tensor] = {}
    for name, p in model.state_dict().items():
        x = p.detach().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # convert_hf_to_gguf.py's permute
            x = x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        as_ = kind if x.ndim == 2 and "embed" not in name else T.F16 if x.ndim == 2 else T.F32
        data = gguf.quantize(np.ascontiguousarray(x), as_)
        back = gguf.dequantize(data, as_).reshape(x.shape)
        if heads:
            back = back.reshape(heads, x.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
        worth[name] = torch.from_numpy(np.array(back, dtype=np.float32))
        to = table.get_name(name, try_suffixes=(".weight",))
        w.add_tensor(str(to), data, raw_dtype=as_)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return worth


def compressed(path: Path, args: QuantizationArgs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Llama quantized and saved by compressed-tensors alone; the weights that its own decompressor makes."""
    model = tiny("llama", **SHAPE).to(dtype)
    model.config.architectures = [type(model).__name__]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config, show_progress=False)
    spec = QuantSpec(
        qtype=f"int{args.num_bits}",
        block=(1, args.group_size) if args.group_size else (1, -1),
        range="absmax_half",
        scale=str(dtype).removeprefix("torch."),
    )
    for _, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data = choose_qparams(module.weight.detach(), spec).scale.clone()
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    assert compressor is not None
    compressor.compress_model(model)
    path.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "model.safetensors")
    model.config.save_pretrained(path)
    compressor.update_config(str(path))
    for name, content in tokenizer().items():
        (path / name).write_bytes(content)
    compressor.decompress_model(model)
    return {n: p.detach().float() for n, p in model.state_dict().items() if not n.endswith(("_scale", "_zero_point"))}


@pytest.mark.parametrize("kind", [T.Q4_0, T.Q4_1, T.Q5_0, T.Q8_0])
def test_a_gguf_file_becomes_a_hugging_face_folder(kind: T, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worth = llama_gguf(tmp_path / "x.gguf", kind)
    code, said = export(capsys, tmp_path / "x.gguf", "--to", "hf", "--out", tmp_path / "out")
    assert code == 0, said
    back = source(tmp_path / "out" / "hf")
    assert {**back.weights}.keys() == {n for n in worth if "proj" in n or "head" in n}
    values = back.state_dict()
    assert values.keys() == worth.keys()
    assert all(torch.equal(values[n].float(), worth[n]) for n in worth)
    assert back.config["model_type"] == "llama"
    assert back.config["rms_norm_eps"] == 1e-6
    assert back.config["num_key_value_heads"] == 2


def test_compressed_tensors_runs_in_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    worth = compressed(tmp_path / "ct", args, torch.float16)
    code, said = export(capsys, tmp_path / "ct", "--to", "gguf", "--out", tmp_path / "out")
    assert code == 0, said
    assert "tokenizer equal" in said
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "gguf" / "model.gguf").tensors}
    assert read["blk.0.ffn_up.weight"].tensor_type == T.Q4_0
    up = gguf.dequantize(read["blk.0.ffn_up.weight"].data, T.Q4_0)
    want = source(tmp_path / "ct").state_dict()
    assert torch.equal(torch.from_numpy(up), want["model.layers.0.mlp.up_proj.weight"])
    assert all(torch.equal(want[n].half().float(), worth[n]) for n in want)
