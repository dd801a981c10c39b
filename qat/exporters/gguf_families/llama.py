"""Llama, Mistral, Qwen2 and Qwen3: SwiGLU decoders with rotary positions and RMS norms."""

import math
from typing import Any

import torch
from gguf import MODEL_ARCH
from torch import Tensor

from qat.errors import UserError
from qat.exporters.gguf_families.base import ATTENTION, GATED_MLP, Config, Family

LAYER = ("input_layernorm", *ATTENTION, "post_attention_layernorm", *GATED_MLP)


class LlamaLike(Family):
    """SwiGLU, RMS norms, whole heads rotated in halves; in llama.cpp, full attention in every layer."""

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
        """The frequency divisors of Llama 3's long context, float32 [head / 2]: transformers'
        `_compute_llama3_parameters`, as divisors of the plain frequencies."""
        rope = self.rope(config)
        if rope["rope_type"] != "llama3":
            return {}
        dim, old = self.head_dim(config), rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).float()}

    def read_rope(self, get: dict[str, Any], derived: dict[str, Tensor]) -> dict[str, Any]:
        """Llama 3's own from its divisors: they are the same for one multiple of both frequency factors and the
        original length, so the published factors 1 and 4 are taken. Raises UserError if other divisors are there."""
        rest = {name: value for name, value in derived.items() if name != "rope_freqs.weight"}
        rope = super().read_rope(get, rest)
        if rest == derived:
            return rope
        divisors = derived["rope_freqs.weight"].float()
        rope |= {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
        for power in range(4, 24):
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 2**power}
            config = {"head_dim": 2 * len(divisors), "rope_parameters": rope}
            made = self.extra_tensors(config)["rope_freqs.weight"]
            if made.shape == divisors.shape and torch.allclose(made, divisors, rtol=1e-5, atol=0):
                return rope
        raise UserError("the file's rope_freqs are not Llama 3's, which config.json could say")


_LLAMA = Llama(MODEL_ARCH.LLAMA, LAYER, ropes=("default", "linear", "yarn", "llama3"))
_ROPES = ("default", "linear", "yarn")
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": LlamaLike(MODEL_ARCH.QWEN2, LAYER, ropes=_ROPES),
    "qwen3": LlamaLike(MODEL_ARCH.QWEN3, (*LAYER, "self_attn.q_norm", "self_attn.k_norm"), ropes=_ROPES),
}
