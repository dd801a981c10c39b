"""Gemma 1, 2 and 3 (text): embeddings times sqrt(hidden), norms times 1 + w, a GELU gate, a head that is the embedding.

llama.cpp's files hold 1 + w, which is what the model itself computes in float32.
"""

from typing import Any

from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from qat.exporters.gguf_families.base import ATTENTION, GATED_MLP, TANH_GELU, Config, Family
from qat.exporters.gguf_families.llama import LAYER

SANDWICH = (
    *("input_layernorm", *ATTENTION, "post_attention_layernorm"),
    *("pre_feedforward_layernorm", *GATED_MLP, "post_feedforward_layernorm"),
)


class Gemma(Family):
    """Norms are kept as 1 + w in float32, and read back as that less 1: many w share one 1 + w."""

    def refuse(self, config: Config) -> str | None:
        for key in ("attention_bias", "use_bidirectional_attention"):
            if config.get(key):
                return f"llama.cpp's {config['model_type']} knows no {key}; set it to false"
        return super().refuse(config)

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value + 1 if name.endswith("norm.weight") else value

    def restored(self, name: str, value: Tensor) -> Tensor:
        return value - 1 if name.endswith("norm.weight") else value


class Windowed(Gemma):
    """Some layers see a sliding window, every n-th sees everything. llama.cpp scales attention by what the published
    models have. big: the number of layers of the 27B model, whose heads it scales by another width."""

    big: int

    def refuse(self, config: Config) -> str | None:
        kind = config["model_type"]
        dim = self.scaled_width(config)
        if config["query_pre_attn_scalar"] != dim:
            return f"llama.cpp's {kind} divides by sqrt({dim}), not by that of {config['query_pre_attn_scalar']}"
        if not config.get("sliding_window"):
            return f"llama.cpp's {kind} wants a sliding_window"
        if self.pattern(config) is None:
            return f"llama.cpp's {kind} wants full attention in every n-th layer and sliding_attention in the others"
        return super().refuse(config)

    def scaled_width(self, config: Config) -> int:
        """llama.cpp divides attention by the square root of this."""
        if config["num_hidden_layers"] == self.big:
            return config["hidden_size"] // config["num_attention_heads"]
        return self.head_dim(config)

    def pattern(self, config: Config) -> int | None:
        """n where every n-th layer sees everything (more than the layers: none does); None for another order.

        llama.cpp keeps this one number, config.json a name for each layer (`layer_types`).
        """
        full = [kind == "full_attention" for kind in config["layer_types"]]
        n = full.index(True) + 1 if any(full) else len(full) + 1
        return n if full == [(i + 1) % n == 0 for i in range(len(full))] else None

    def ignored_window(self, config: Config) -> None:
        return None  # llama.cpp computes these

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        super().write_metadata(w, config)
        w.add_sliding_window(config["sliding_window"])
        pattern = self.pattern(config)
        assert pattern is not None
        w.add_sliding_window_pattern(pattern)

    def read_config(self, get: dict[str, Any]) -> Config:
        n = get["attention.sliding_window_pattern"]
        kinds = ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(get["block_count"])]
        more = {"sliding_window": get["attention.sliding_window"], "layer_types": kinds}
        config = {**super().read_config(get), **more}
        return {**config, "query_pre_attn_scalar": self.scaled_width(config)}


class Gemma2(Windowed):
    """Scores and logits are capped by a tanh, in llama.cpp always."""

    big = 46

    def refuse(self, config: Config) -> str | None:
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if not config.get(key):
                return f"llama.cpp's gemma2 always has {key}; this model has none"
        return super().refuse(config)

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        super().write_metadata(w, config)
        w.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        w.add_final_logit_softcapping(config["final_logit_softcapping"])

    def read_config(self, get: dict[str, Any]) -> Config:
        keys = ("attn_logit_softcapping", "final_logit_softcapping")
        return {**super().read_config(get), **{key: get[key] for key in keys}}


class Gemma3(Windowed):
    """Sliding layers rotate by a base of their own."""

    big = 62

    def rope(self, config: Config) -> dict[str, Any]:
        return super().rope({**config, "rope_parameters": config["rope_parameters"]["full_attention"]})

    def sliding_rope(self, config: Config) -> dict[str, Any]:
        """`rope`, which is of the layers that see everything, for those with a window."""
        return super().rope({**config, "rope_parameters": config["rope_parameters"]["sliding_attention"]})

    def refuse(self, config: Config) -> str | None:
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key):
                return f"llama.cpp's gemma3 knows no {key}"
        if self.sliding_rope(config)["rope_type"] != "default":
            return "llama.cpp's gemma3 knows only the default rope type in its sliding layers"
        return super().refuse(config)

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        super().write_metadata(w, config)
        w.add_rope_freq_base_swa(self.sliding_rope(config)["rope_theta"])

    def read_rope(self, get: dict[str, Any], derived: dict[str, Tensor]) -> dict[str, Any]:
        sliding = {"rope_type": "default", "rope_theta": get.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": super().read_rope(get, derived), "sliding_attention": sliding}


_OF_GEMMA: dict[str, Any] = {"activations": TANH_GELU[::-1], "tied": True}
FAMILIES: dict[str, Family] = {
    "gemma": Gemma(MODEL_ARCH.GEMMA, LAYER, **_OF_GEMMA),
    "gemma2": Gemma2(MODEL_ARCH.GEMMA2, SANDWICH, **_OF_GEMMA),
    "gemma3_text": Gemma3(MODEL_ARCH.GEMMA3, (*SANDWICH, "self_attn.q_norm", "self_attn.k_norm"), **_OF_GEMMA),
}
