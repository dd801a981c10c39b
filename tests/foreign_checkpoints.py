"""Checkpoints as others write them: gguf-py and ggml, compressed-tensors' own compressor, GPTQ by hand in numpy."""

import json
from pathlib import Path
from typing import Any

import ggml_library
import gguf
import numpy as np
import torch
from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.apply import apply_quantization_config
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file
from tiny_text_models import byte_level_tokenizer, tiny, tokenizer_files

from qat.affine import choose_qparams
from qat.scheme import QuantSpec

SHAPE: dict[str, Any] = {"tie_word_embeddings": False, "intermediate_size": 128}
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def tokenizer() -> dict[str, bytes]:
    end = "<|endoftext|>"
    return tokenizer_files(byte_level_tokenizer("smaug-bpe"), bos_token=end, eos_token=end, unk_token=end)


# of llama.cpp's Q4_K_M, by the end of a parameter's name; the other matrices are Q4_K
Q4_K_M = {"lm_head.weight": T.Q6_K, "0.self_attn.v_proj.weight": T.Q6_K, "0.mlp.down_proj.weight": T.Q6_K}


def quantized(x: np.ndarray, kind: T) -> np.ndarray:
    """By gguf-py, or by ggml's own C code what gguf-py can only read."""
    return ggml_library.quantize(x, kind) if kind.name.endswith("_K") else gguf.quantize(np.ascontiguousarray(x), kind)


def llama_gguf(file: Path, kind: T, mix: dict[str, T] | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """A Llama written by gguf-py alone as llama.cpp's converter does; what its tensors are worth, by HF name. mix:
    the types of the parameters whose names end so, where they are not `kind`; for the embedding too."""
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
        as_ = next((to for ending, to in (mix or {}).items() if name.endswith(ending)), as_)
        data = quantized(x, as_)
        back = gguf.dequantize(data, as_).reshape(x.shape)
        if heads:
            back = back.reshape(heads, x.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(x.shape)
        worth[name] = torch.from_numpy(np.array(back, dtype=np.float32))
        to = table.get_name(name, try_suffixes=(".weight", ".bias"))
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


def packed(x: np.ndarray) -> torch.Tensor:
    """Codes (R, C) below 16, eight to an int32 word along R, low bits first: as the GPTQ format is described."""
    rows = x.astype(np.uint32).reshape(x.shape[0] // 8, 8, x.shape[1])
    return torch.from_numpy(sum(rows[:, i] << np.uint32(4 * i) for i in range(8)).view(np.int32).copy())


def gptq(path: Path, version: int, symmetric: bool, group: int = 64) -> dict[str, torch.Tensor]:
    """A GPTQ folder made by hand as AutoGPTQ writes it, with its biases of zeros; what its weights are worth."""
    model = tiny("llama", **SHAPE)
    made = np.random.default_rng(0)
    stored: dict[str, torch.Tensor] = {}
    worth: dict[str, torch.Tensor] = {}
    for name, p in model.half().state_dict().items():
        if "proj" not in name:
            stored[name] = worth[name] = p.detach().clone()
            continue
        out, columns = p.shape
        codes = made.integers(0, 16, (columns, out))
        zeros = np.full((columns // group, out), 8) if symmetric else made.integers(1, 16, (columns // group, out))
        scales = made.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
        index = np.arange(columns) // group
        module = name.removesuffix(".weight")
        stored |= {
            f"{module}.qweight": packed(codes),
            f"{module}.qzeros": packed((zeros - (version == 1)).T).t().contiguous(),
            f"{module}.scales": torch.from_numpy(scales),
            f"{module}.g_idx": torch.from_numpy(index.astype(np.int32)),
            f"{module}.bias": torch.zeros(out, dtype=torch.float16),
        }
        value = scales[index].astype(np.float32) * (codes - zeros[index]).astype(np.float32)
        worth[name] = torch.from_numpy(value.T.copy())
    path.mkdir()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": False}
    how |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    (path / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": how}, default=str))
    for name, content in tokenizer().items():
        (path / name).write_bytes(content)
    return worth
