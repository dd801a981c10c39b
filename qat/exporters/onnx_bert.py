"""BERT as an ONNX graph: classification of a text or of its tokens, or masked words, by config["architectures"]."""

from typing import Any

import numpy as np

from qat.exporters.onnx_text_graph import ACTIVATIONS, TextGraph

Config = dict[str, Any]
INPUTS = {"input_ids": "sequence", "attention_mask": "sequence", "token_type_ids": "sequence"}
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
_LAYER = (
    *(f"attention.self.{m}" for m in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
)
_MASKED = "cls.predictions"
_HEADS = {
    "BertForSequenceClassification": ("bert.pooler.dense", "classifier"),
    "BertForTokenClassification": ("classifier",),
    "BertForMaskedLM": (f"{_MASKED}.transform.dense", f"{_MASKED}.transform.LayerNorm", f"{_MASKED}.decoder", _MASKED),
}


def _head(config: Config) -> str:
    return (config.get("architectures") or ["none"])[0]


def modules(config: Config) -> list[str]:
    """Every module that has parameters."""
    layers = (f"bert.encoder.layer.{i}.{m}" for i in range(config["num_hidden_layers"]) for m in _LAYER)
    return [*(f"bert.embeddings.{m}" for m in _EMBEDDINGS), *layers, *_HEADS[_head(config)]]


def cache(config: Config) -> tuple[int, int, int]:
    """An encoder has no cache."""
    return 0, 0, 0


def logits_shape(config: Config) -> list[str]:
    """The axes of the output."""
    return ["batch", "labels"] if _head(config) == "BertForSequenceClassification" else ["batch", "sequence", "labels"]


def refuse_model(config: Config) -> str | None:
    """Why this graph does not compute the model; None if it does."""
    if _head(config) not in _HEADS:
        return f"the graph knows {', '.join(_HEADS)}, not {_head(config)}"
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        return f"the graph knows the activations {', '.join(ACTIVATIONS)}, not {config['hidden_act']}"
    return "a BERT that decodes is not part of the graph" if config.get("is_decoder") else None


def build(graph: TextGraph, config: Config) -> str:
    """input_ids, attention_mask and token_type_ids -> logits: [batch, labels], or one row for each token."""
    epsilon, heads = config["layer_norm_eps"], config["num_attention_heads"]
    dim = config["hidden_size"] // heads
    act = config.get("hidden_act", "gelu")
    at = "bert.embeddings"
    x = graph.add("Add", [graph.embedding(f"{at}.word_embeddings", "input_ids"), _positions(graph)], "/embeddings/1")
    types = graph.embedding(f"{at}.token_type_embeddings", "token_type_ids")
    x = graph.layer_norm(f"{at}.LayerNorm", graph.add("Add", [x, types], "/embeddings/2"), epsilon)
    mask = graph.padding()
    for i in range(config["num_hidden_layers"]):
        at = f"bert.encoder.layer.{i}"
        qkv = [graph.linear(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value")]
        y = graph.add(
            "Attention",
            [*qkv, mask],
            f"{at}.attention.self/attention",
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=dim**-0.5,
        )
        y = graph.add("Add", [graph.linear(f"{at}.attention.output.dense", y), x], f"{at}.attention/residual")
        x = graph.layer_norm(f"{at}.attention.output.LayerNorm", y, epsilon)
        y = graph.activation(f"{at}.intermediate/act", graph.linear(f"{at}.intermediate.dense", x), act)
        y = graph.add("Add", [graph.linear(f"{at}.output.dense", y), x], f"{at}.output/residual")
        x = graph.layer_norm(f"{at}.output.LayerNorm", y, epsilon)
    if _head(config) == "BertForSequenceClassification":
        # the first token stays [batch, 1, hidden]: of a matrix ONNX Runtime would make a Gemm, in floating point
        x = graph.add("Gather", [x, graph.ints(0)], "/pooler/first", axis=1)
        x = graph.add("Tanh", [graph.linear("bert.pooler.dense", x)], "/pooler/tanh")
        return graph.add("Squeeze", [graph.linear("classifier", x), graph.ints(1)], "/pooler/logits")
    if _head(config) == "BertForTokenClassification":
        return graph.linear("classifier", x)
    x = graph.activation(f"{_MASKED}/act", graph.linear(f"{_MASKED}.transform.dense", x), act)
    return graph.linear(f"{_MASKED}.decoder", graph.layer_norm(f"{_MASKED}.transform.LayerNorm", x, epsilon))


def _positions(graph: TextGraph) -> str:
    """The embedding of 0, 1, 2, …: [sequence, hidden]."""
    length = graph.add("Shape", ["input_ids"], "/positions/length", start=1)
    zero, one = graph.constant("/zero", np.array(0, np.int64)), graph.constant("/one", np.array(1, np.int64))
    end = graph.add("Squeeze", [length], "/positions/end")
    return graph.embedding("bert.embeddings.position_embeddings", graph.add("Range", [zero, end, one], "/positions"))
