"""Llama, Mistral, Qwen2 and Qwen3 as an ONNX graph with a KV cache: RMSNorm, rotary positions, grouped queries."""

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from qat.exporters.onnx_text_graph import ACTIVATIONS, DECODER_INPUTS, TextGraph

Config = dict[str, Any]
INPUTS = DECODER_INPUTS
_LAYER = (
    "input_layernorm",
    *(f"self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj")),
    "post_attention_layernorm",
    *(f"mlp.{m}" for m in ("gate_proj", "up_proj", "down_proj")),
)
_NORMED = ("self_attn.q_norm", "self_attn.k_norm")  # Qwen3
_ROPES = ("default", "linear", "yarn", "llama3")  # those whose frequencies do not depend on the length of the text


def modules(config: Config) -> list[str]:
    """Every module that has parameters."""
    layer = (*_LAYER, *(_NORMED if config["model_type"] == "qwen3" else ()))
    layers = (f"model.layers.{i}.{m}" for i in range(config["num_hidden_layers"]) for m in layer)
    return ["model.embed_tokens", *layers, "model.norm", "lm_head"]


def cache(config: Config) -> tuple[int, int, int]:
    """(layers, heads, size of a head) of the KV cache."""
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    return config["num_hidden_layers"], config.get("num_key_value_heads") or heads, dim


def logits_shape(config: Config) -> list[str]:
    """The axes of the output."""
    return ["batch", "sequence", "vocabulary"]


def refuse_model(config: Config) -> str | None:
    """Why this graph does not compute the model; None if it does."""
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        return f"the graph knows the activations {', '.join(ACTIVATIONS)}, not {config['hidden_act']}"
    rope = _rope(config)
    if rope["rope_type"] not in _ROPES:
        return f"the graph knows rotary positions of type {', '.join(_ROPES)}, not {rope['rope_type']}"
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        return "the graph rotates whole heads; partial_rotary_factor is not part of it"
    return None


def _rope(config: Config) -> dict[str, Any]:
    """transformers 5 keeps everything in rope_parameters; older configs have rope_theta and rope_scaling."""
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    return {**rope, "rope_type": rope.get("rope_type") or rope.get("type") or "default"}


def _frequencies(config: Config) -> tuple[Tensor, float]:
    """transformers' own: inverse frequencies float32 [dim / 2], and the factor of cosines and sines."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    made: Any = AutoConfig.for_model(**config)
    kind = _rope(config)["rope_type"]
    init = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    return init(made, device=None)


def _window(config: Config, layer: int) -> int | None:
    """How many tokens a layer looks back, itself included; None for all."""
    size = config.get("sliding_window")
    kinds = config.get("layer_types")
    if size is None or (config["model_type"] != "mistral" and not config.get("use_sliding_window")):
        return None
    return size if kinds is None or kinds[layer] == "sliding_attention" else None


def build(graph: TextGraph, config: Config) -> str:
    """input_ids and position_ids -> logits."""
    epsilon = config["rms_norm_eps"]
    layers, kv_heads, dim = cache(config)
    heads = config["num_attention_heads"]
    angles = _angles(graph, config)
    x = graph.embedding("model.embed_tokens", "input_ids")
    for i in range(layers):
        at = f"model.layers.{i}"
        y = graph.rms_norm(f"{at}.input_layernorm", x, epsilon)
        q, k, v = (graph.linear(f"{at}.self_attn.{part}_proj", y) for part in "qkv")
        if config["model_type"] == "qwen3":
            q = _normed(graph, f"{at}.self_attn.q_norm", q, heads, dim, epsilon)
            k = _normed(graph, f"{at}.self_attn.k_norm", k, kv_heads, dim, epsilon)
        q = graph.add("RotaryEmbedding", [q, *angles], f"{at}.self_attn/rotate_q", num_heads=heads)
        k = graph.add("RotaryEmbedding", [k, *angles], f"{at}.self_attn/rotate_k", num_heads=kv_heads)
        mask = graph.mask(_window(config, i))
        y = graph.attention(f"{at}.self_attn", i, [q, k, v], (heads, kv_heads), dim**-0.5, mask)
        x = graph.add("Add", [x, graph.linear(f"{at}.self_attn.o_proj", y)], f"{at}.self_attn/residual")
        y = graph.rms_norm(f"{at}.post_attention_layernorm", x, epsilon)
        gate = graph.linear(f"{at}.mlp.gate_proj", y)
        gate = graph.activation(f"{at}.mlp/act", gate, config.get("hidden_act", "silu"))
        y = graph.add("Mul", [gate, graph.linear(f"{at}.mlp.up_proj", y)], f"{at}.mlp/gated")
        x = graph.add("Add", [x, graph.linear(f"{at}.mlp.down_proj", y)], f"{at}.mlp/residual")
    return graph.linear("lm_head", graph.rms_norm("model.norm", x, epsilon))


def _normed(graph: TextGraph, module: str, x: str, heads: int, dim: int, epsilon: float) -> str:
    split = graph.add("Reshape", [x, graph.ints(0, 0, heads, dim)], f"{module}/heads")
    return graph.add("Reshape", [graph.rms_norm(module, split, epsilon), graph.ints(0, 0, -1)], f"{module}/joined")


def _angles(graph: TextGraph, config: Config) -> tuple[str, str]:
    """Cosines and sines of every position, float32 [batch, sequence, dim / 2]."""
    inverse, factor = _frequencies(config)
    positions = graph.add("Cast", ["position_ids"], "/rope/positions", to=TensorProto.FLOAT)
    positions = graph.add("Unsqueeze", [positions, graph.ints(-1)], "/rope/column")
    frequencies = graph.constant("/rope/frequencies", inverse.float().numpy().astype(np.float32))
    angles = graph.add("Mul", [positions, frequencies], "/rope/angles")
    made = [graph.add(op, [angles], f"/rope/{op}") for op in ("Cos", "Sin")]
    if factor != 1.0:
        made = [graph.add("Mul", [m, graph.number(float(factor))], f"{m}/scaled") for m in made]
    return made[0], made[1]
