"""GPT-2 as an ONNX graph with a KV cache."""

from typing import Any

from qat.exporters.onnx_text_graph import ACTIVATIONS, DECODER_INPUTS, TextGraph

Config = dict[str, Any]
# Of one name, the two lengths would let ONNX Runtime fuse the embeddings' sum with the first norm, into a kernel that
# takes the variance as the mean of squares less the squared mean: other last bits, which flip int8 codes by rows.
INPUTS = {**DECODER_INPUTS, "position_ids": "positions"}
_LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def modules(config: Config) -> list[str]:
    """Every module that has parameters."""
    layers = (f"transformer.h.{i}.{m}" for i in range(config["n_layer"]) for m in _LAYER)
    return ["transformer.wte", "transformer.wpe", *layers, "transformer.ln_f", "lm_head"]


def cache(config: Config) -> tuple[int, int, int]:
    """(layers, heads, size of a head) of the KV cache."""
    return config["n_layer"], config["n_head"], config["n_embd"] // config["n_head"]


def logits_shape(config: Config) -> list[str]:
    """The axes of the output."""
    return ["batch", "sequence", "vocabulary"]


def refuse_model(config: Config) -> str | None:
    """Why this graph does not compute the model; None if it does."""
    kind = config.get("activation_function", "gelu_new")
    if kind not in ACTIVATIONS:
        return f"the graph knows the activations {', '.join(ACTIVATIONS)}, not {kind}"
    return "cross-attention is not part of the graph" if config.get("add_cross_attention") else None


def build(graph: TextGraph, config: Config) -> str:
    """input_ids and position_ids -> logits."""
    epsilon, layers = config["layer_norm_epsilon"], config["n_layer"]
    _, heads, dim = cache(config)
    tokens = graph.embedding("transformer.wte", "input_ids")
    x = graph.add("Add", [tokens, graph.embedding("transformer.wpe", "position_ids")], "/embeddings")
    for i in range(layers):
        at = f"transformer.h.{i}"
        scale = dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx"):
            scale /= i + 1
        y = graph.linear(f"{at}.attn.c_attn", graph.layer_norm(f"{at}.ln_1", x, epsilon))
        qkv = [f"{at}.attn/{part}" for part in "qkv"]
        graph.add("Split", [y], f"{at}.attn/split", qkv, axis=-1, num_outputs=3)
        y = graph.attention(f"{at}.attn", i, qkv, (heads, heads), scale, graph.mask(None))
        x = graph.add("Add", [x, graph.linear(f"{at}.attn.c_proj", y)], f"{at}.attn/residual")
        y = graph.linear(f"{at}.mlp.c_fc", graph.layer_norm(f"{at}.ln_2", x, epsilon))
        y = graph.activation(f"{at}.mlp/act", y, config.get("activation_function", "gelu_new"))
        x = graph.add("Add", [x, graph.linear(f"{at}.mlp.c_proj", y)], f"{at}.mlp/residual")
    return graph.linear("lm_head", graph.layer_norm("transformer.ln_f", x, epsilon))
