"""Phi 1 and 2: attention and MLP side by side, GELU, biases. Phi 3: Llama's layers with q/k/v and gate/up fused."""

import math
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from qat.exporters.gguf_families.base import TANH_GELU, Config, Family

PARALLEL = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
    *("mlp.fc1", "mlp.fc2"),
)
FUSED = (
    *("input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_up_proj", "mlp.down_proj"),
)


class Phi(Family):
    """One norm before attention and MLP, which are added; part of each head is rotated. llama.cpp calls both phi2."""

    def refuse(self, config: Config) -> str | None:
        if config.get("qk_layernorm"):
            return "llama.cpp's phi2 knows no qk_layernorm"
        return super().refuse(config)


class Phi3(Family):
    """Both keep q, k, v and gate, up in this order. llama.cpp ignores the sliding window; its longrope has two tables
    of divisors, and it takes the long one where its context (not the text) is larger than the original one."""

    def original(self, config: Config) -> int | None:
        """The context within which the short divisors hold, for longrope."""
        rope = self.rope(config)
        return rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None

    def refuse(self, config: Config) -> str | None:
        if self.head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
            return "llama.cpp's phi3 wants num_attention_heads heads that together are hidden_size wide"
        return super().refuse(config)

    def text_limit(self, config: Config) -> tuple[int, str] | None:
        found = [limit] if (limit := super().text_limit(config)) else []
        if original := self.original(config):
            why = f"llama.cpp takes the long rope factors where its context is larger than {original} tokens"
            found.append((original // 256 * 256 - 8, why))  # a context is a multiple of 256, with room for an answer
        return min(found) if found else None

    def context(self, config: Config) -> int:
        """The original context for longrope, so that llama.cpp takes the short divisors, as texts inside it need."""
        return min(super().context(config), self.original(config) or config["max_position_embeddings"])

    def extra_tensors(self, config: Config) -> dict[str, Tensor]:
        """longrope's two tables of frequency divisors, float32 [rotated dimensions / 2]."""
        if self.original(config) is None:
            return {}
        rope = self.rope(config)
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")
        }

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        """The attention factor is transformers' `_compute_longrope_parameters`, written out where it is the default."""
        super().write_metadata(w, config)
        original = self.original(config)
        if original is None:
            return
        rope = self.rope(config)
        factor = rope.get("factor") or config["max_position_embeddings"] / original
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        scale = rope.get("attention_factor")
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_rope_scaling_attn_factors(usual if scale is None else scale)

    def read_rope(self, get: dict[str, Any], derived: dict[str, Tensor]) -> dict[str, Any]:
        if not derived:
            return super().read_rope(get, derived)
        ours = ("rope.scaling.attn_factor", "rope.scaling.original_context_length")
        rope = super().read_rope({k: v for k, v in get.items() if k not in ours}, {})
        rope |= {
            f"{kind}_factor": derived[f"rope_factors_{kind}.weight"].float().tolist() for kind in ("long", "short")
        }
        original = get["rope.scaling.original_context_length"]
        more = {"original_max_position_embeddings": original, "attention_factor": get.get(ours[0], 1.0)}
        return {**rope, **more, "rope_type": "longrope"}


FAMILIES: dict[str, Family] = {
    "phi": Phi(
        MODEL_ARCH.PHI2,
        PARALLEL,
        activations=TANH_GELU,
        partial_rotary=True,
        tied=False,
        top=("model.final_layernorm",),
    ),
    "phi3": Phi3(MODEL_ARCH.PHI3, FUSED, ropes=("default", "linear", "longrope"), partial_rotary=True),
}
