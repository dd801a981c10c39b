"""Which models GGUF export knows: Hugging Face <-> GGUF tensor names, and the metadata of each family."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor

Config = dict[str, Any]

_LLAMA_LAYER = (
    "input_layernorm",
    *(f"self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    "post_attention_layernorm",
    *(f"mlp.{m}" for m in ("gate_proj", "up_proj", "down_proj")),
)
_GPT2_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. top, layer: module names. interleaved: llama.cpp rotates neighbouring rows of q and k
    where transformers rotates halves, so their rows are reordered."""

    arch: MODEL_ARCH
    top: tuple[str, ...]
    layers: str
    layer: tuple[str, ...]
    embedding: str
    interleaved: bool = False


def _llama_like(arch: MODEL_ARCH, interleaved: bool = False) -> Family:
    top = ("model.embed_tokens", "model.norm", "lm_head")
    return Family(arch, top, "model.layers", _LLAMA_LAYER, "model.embed_tokens.weight", interleaved)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        MODEL_ARCH.GPT2,
        ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"),
        "transformer.h",
        _GPT2_LAYER,
        "transformer.wte.weight",
    ),
    "llama": _llama_like(MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": _llama_like(MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": _llama_like(MODEL_ARCH.QWEN2),
    "qwen3": _llama_like(MODEL_ARCH.QWEN3),
}
MODEL_TYPE = "qat.model_type"  # ours: to llama.cpp a Mistral is a Llama
KV_CACHE = "qat.kv_cache"  # ours: the cache that training simulated, if any
MODEL_TYPES = {MODEL_ARCH_NAMES[f.arch]: name for name, f in reversed(FAMILIES.items())}


def n_layers(config: Config) -> int:
    return config["n_layer"] if config["model_type"] == "gpt2" else config["num_hidden_layers"]


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


@cache
def names(model_type: str, layers: int) -> dict[str, str]:
    """Hugging Face parameter name -> GGUF tensor name, for every parameter the family can have."""
    family = FAMILIES[model_type]
    table = get_tensor_name_map(family.arch, layers)
    modules = [*family.top, *(f"{family.layers}.{i}.{m}" for i in range(layers) for m in family.layer)]
    found = {m: table.get_name(m) for m in modules}
    return {f"{m}.{kind}": f"{to}.{kind}" for m, to in found.items() if to for kind in ("weight", "bias")}


def row_order(name: str, config: Config) -> Tensor | None:
    """The Hugging Face row behind each GGUF row of this parameter (int64 [out]); None if the order is the same."""
    if not FAMILIES[config["model_type"]].interleaved:
        return None
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return None
    dim = head_dim(config)
    return torch.arange(heads * dim).reshape(heads, 2, dim // 2).transpose(1, 2).reshape(-1)


def refuse_model(config: Config) -> str | None:
    """Why llama.cpp cannot compute this model; None if it can."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return f"GGUF export knows {', '.join(FAMILIES)}, not {kind}; use the hf target"
    if kind == "gpt2":
        if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            return f"llama.cpp's gpt2 computes gelu_new, not {config['activation_function']}"
        if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
            return "llama.cpp's gpt2 knows only the usual attention scaling"
        return None
    if config.get("hidden_act", "silu") != "silu":
        return f"llama.cpp's {kind} computes silu, not {config['hidden_act']}"
    if config.get("use_sliding_window"):
        return f"llama.cpp's {kind} has no sliding window; set use_sliding_window to false"
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        return f"GGUF export does not know rope type {rope['rope_type']}"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        return "GGUF export does not know partial rotary embeddings"
    return None


def refuse_text(tokens: int, config: Config) -> str | None:
    """Why llama.cpp cannot score texts of so many tokens as trained; None if it can."""
    window = config.get("sliding_window")
    if not window or tokens <= window:
        return None
    return (
        f"llama.cpp computes this model without its sliding window of {window} tokens, so texts must stay inside it; "
        f"give data.block_size={window} or less"
    )


def _rope(config: Config) -> dict[str, Any]:
    """transformers 5 keeps everything in rope_parameters; older configs have rope_theta and rope_scaling."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def extra_tensors(config: Config) -> dict[str, Tensor]:
    """Tensors that llama.cpp wants and transformers computes: the frequency divisors of Llama 3's long context."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    dim, old = head_dim(config), rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}


def write_metadata(w: GGUFWriter, config: Config) -> None:
    """The hyperparameters that llama.cpp needs, under their GGUF names."""
    w.add_string(MODEL_TYPE, config["model_type"])
    if config.get("kv_cache"):
        w.add_string(KV_CACHE, config["kv_cache"])
    w.add_block_count(n_layers(config))
    if config["model_type"] == "gpt2":
        w.add_context_length(config["n_positions"])
        w.add_embedding_length(config["n_embd"])
        w.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        w.add_head_count(config["n_head"])
        w.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    rope = _rope(config)
    window = config.get("sliding_window") or config["max_position_embeddings"]  # llama.cpp has none: stay inside it
    w.add_context_length(min(config["max_position_embeddings"], window))
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    w.add_key_length(head_dim(config))
    w.add_value_length(head_dim(config))
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_dimension_count(head_dim(config))
    w.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def read_config(fields: dict[str, Any]) -> Config:
    """Metadata of a GGUF file -> the part of config.json that it holds. Raises KeyError where some is missing."""
    arch = fields["general.architecture"]
    model_type = fields.get(MODEL_TYPE, MODEL_TYPES[arch])
    get = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    if model_type == "gpt2":
        return {
            "model_type": model_type,
            "n_layer": get["block_count"],
            "n_embd": get["embedding_length"],
            "n_head": get["attention.head_count"],
            "n_positions": get["context_length"],
            "n_inner": get["feed_forward_length"],
            "layer_norm_epsilon": get["attention.layer_norm_epsilon"],
        }
    return {
        "model_type": model_type,
        "num_hidden_layers": get["block_count"],
        "hidden_size": get["embedding_length"],
        "num_attention_heads": get["attention.head_count"],
        "num_key_value_heads": get["attention.head_count_kv"],
        "head_dim": get["attention.key_length"],
        "max_position_embeddings": get["context_length"],
        "intermediate_size": get["feed_forward_length"],
        "rms_norm_eps": get["attention.layer_norm_rms_epsilon"],
        "rope_theta": get["rope.freq_base"],
    }
