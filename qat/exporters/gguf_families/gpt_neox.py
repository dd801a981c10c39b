"""GPT-NeoX (Pythia): q, k and v fused head by head, partial rotary positions, attention and MLP side by side."""

from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from qat.exporters.gguf_families.base import TANH_GELU, Config, Family


class GPTNeoX(Family):
    """One fused weight [3 * hidden, hidden] for q, k and v, and its bias [3 * hidden], whose rows are reordered."""

    def refuse(self, config: Config) -> str | None:
        if not config.get("attention_bias", True):
            return "llama.cpp's gptneox wants biases in attention; this model has attention_bias=false"
        return super().refuse(config)

    def row_order(self, name: str, config: Config) -> Tensor | None:
        """transformers keeps q, k and v of one head together, llama.cpp all q, then all k, then all v."""
        if ".query_key_value." not in name:
            return None
        heads, dim = config["num_attention_heads"], self.head_dim(config)
        return torch.arange(heads * 3 * dim).reshape(heads, 3, dim).transpose(0, 1).reshape(-1)

    def write_metadata(self, w: GGUFWriter, config: Config) -> None:
        super().write_metadata(w, config)
        w.add_parallel_residual(config["use_parallel_residual"])

    def read_config(self, get: dict[str, Any]) -> Config:
        return {**super().read_config(get), "use_parallel_residual": get["use_parallel_residual"]}


FAMILIES: dict[str, Family] = {
    "gpt_neox": GPTNeoX(
        MODEL_ARCH.GPTNEOX,
        (
            *("input_layernorm", "attention.query_key_value", "attention.dense"),
            *("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        activations=TANH_GELU,
        partial_rotary=True,
        tied=False,
        layers="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        top=("gpt_neox.final_layer_norm",),
    )
}
