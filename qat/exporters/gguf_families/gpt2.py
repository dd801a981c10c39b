"""GPT-2: learned positions, layer norms with biases, names of its own in config.json."""

from typing import Any

from gguf import MODEL_ARCH, GGUFWriter

from qat.exporters.gguf_families.base import TANH_GELU, Config, Family


class GPT2(Family):
    """Keys of config.json as transformers' GPT2Config names them; `n_inner: null` there means 4 * n_embd."""

    def n_layers(self, config: Config) -> int:
        return config["n_layer"]

    def refuse(self, config: Config) -> str | None:
        if why := self.refuse_activation(config):
            return why
        if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
            return "llama.cpp's gpt2 knows only the usual attention scaling"
        return None

    def ignored_window(self, config: Config) -> None:
        return None

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        w.add_context_length(config["n_positions"])
        w.add_embedding_length(config["n_embd"])
        w.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        w.add_head_count(config["n_head"])
        w.add_layer_norm_eps(config["layer_norm_epsilon"])

    def read_config(self, get: dict[str, Any]) -> Config:
        return {
            "n_layer": get["block_count"],
            "n_embd": get["embedding_length"],
            "n_head": get["attention.head_count"],
            "n_positions": get["context_length"],
            "n_inner": get["feed_forward_length"],
            "layer_norm_epsilon": get["attention.layer_norm_epsilon"],
        }


FAMILIES: dict[str, Family] = {
    "gpt2": GPT2(
        MODEL_ARCH.GPT2,
        ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        activations=TANH_GELU,
        layers="transformer.h",
        embedding="transformer.wte",
        top=("transformer.wpe", "transformer.ln_f"),
    )
}
