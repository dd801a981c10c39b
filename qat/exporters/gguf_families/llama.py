"""Llama, Mistral, Qwen2 and Qwen3: SwiGLU decoders with rotary positions and RMS norms."""

import math

import torch
from gguf import MODEL_ARCH
from torch import Tensor

from qat.exporters.gguf_families.base import ATTENTION, GATED_MLP, Config, Family

LAYER = ("input_layernorm", *ATTENTION, "post_attention_layernorm", *GATED_MLP)


class LlamaLike(Family):
    def refuse(self, config: Config) -> str | None:
        if config.get("use_sliding_window"):
            return f"llama.cpp's {config['model_type']} has no sliding window; set use_sliding_window to false"
        return super().refuse(config)


class Llama(LlamaLike):
    """llama.cpp rotates neighbouring rows of q and k where transformers rotates halves, so their rows are reordered."""

    def row_order(self, name: str, config: Config) -> Tensor | None:
        heads = config["num_attention_heads"]
        if ".k_proj." in name:
            heads = config.get("num_key_value_heads") or heads
        elif ".q_proj." not in name:
            return None
        dim = self.head_dim(config)
        return torch.arange(heads * dim).reshape(heads, 2, dim // 2).transpose(1, 2).reshape(-1)

    def extra_tensors(self, config: Config) -> dict[str, Tensor]:
        """The frequency divisors of Llama 3's long context."""
        rope = self.rope(config)
        if rope["rope_type"] != "llama3":
            return {}
        dim, old = self.head_dim(config), rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}


_LLAMA = Llama(MODEL_ARCH.LLAMA, LAYER, ropes=("default", "linear", "yarn", "llama3"))
_ROPES = ("default", "linear", "yarn")
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": LlamaLike(MODEL_ARCH.QWEN2, LAYER, ropes=_ROPES),
    "qwen3": LlamaLike(MODEL_ARCH.QWEN3, (*LAYER, "self_attn.q_norm", "self_attn.k_norm"), ropes=_ROPES),
}
