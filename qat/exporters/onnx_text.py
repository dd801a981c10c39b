"""A language model as one ONNX file: GPT-2, the Llama family and BERT, built from `Frozen` alone. Floats are float32.

Decoders have a KV cache. Inputs: input_ids, attention_mask [batch, total], position_ids, past_key_values.N.key / .value
[batch, heads, past, dim]; outputs: logits float32 [batch, sequence, vocabulary], present.N.key / .value.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from onnx import TensorProto, helper

from qat.errors import UserError
from qat.exporters import onnx_bert, onnx_gpt2, onnx_int8, onnx_llama, onnx_nbits
from qat.exporters.onnx_graph import METADATA
from qat.exporters.onnx_stream import OnnxWriter
from qat.exporters.onnx_text_graph import MICROSOFT, TextGraph
from qat.frozen import Frozen
from qat.scheme import QuantSpec, Scheme
from qat.streams import Behind

FAMILIES: dict[str, ModuleType] = {
    "bert": onnx_bert,
    "gpt2": onnx_gpt2,
    "llama": onnx_llama,
    "mistral": onnx_llama,
    "qwen2": onnx_llama,
    "qwen3": onnx_llama,
}
OPSET, IR_VERSION = 23, 11  # the first with Attention, RotaryEmbedding and RMSNormalization


def refuse_model(config: dict[str, Any]) -> str | None:
    """Why the model cannot be written; None if it can."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        return f"ONNX export of language models knows {', '.join(FAMILIES)}, not {kind}; use the hf target"
    return FAMILIES[kind].refuse_model(config)


def refuse_parameter(
    name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]
) -> str | None:
    """Why this parameter cannot be written, and what to do; None if it can."""
    if why := refuse_model(config):
        return why
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or module not in FAMILIES[config["model_type"]].modules(config):
        return f"the graph of {config['model_type']} has no parameter {name}"
    if spec is None:
        return None
    if len(shape) != 2:
        return "only matrices are quantized; leave it out of the rules"
    if onnx_int8.is_row_wise(spec):
        return None
    return onnx_nbits.refuse_grid(spec, (shape[1], shape[0]) if kind == "Conv1D" else (shape[0], shape[1]))


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why a layer cannot compute with this input, and which grid fits; None if it can."""
    if scheme.weight is None:
        return "its input is quantized but its weight is not; quantize both or neither"
    return onnx_int8.refuse_input(scheme) if onnx_int8.is_row_wise(scheme.weight) else onnx_nbits.refuse_input(scheme)


def export(frozen: Frozen, path: Path) -> None:
    """Write `path`, with `path`.data beside it if a protobuf file cannot hold the tensors. Raises UserError."""
    for name in frozen.floats:
        if why := refuse_parameter(name, "", (), None, frozen.config):
            raise UserError(f"export to onnx: {name}: {why}")
    family = FAMILIES[frozen.config["model_type"]]
    first = header(frozen)  # nodes and shapes, then all once more for the numbers
    infos = {t.name: TensorProto(name=t.name, dims=t.dims, data_type=t.data_type) for t in first.graph.initializer}
    first.graph.ClearField("initializer")
    with OnnxWriter(path, first, infos) as writer, Behind(writer.put) as put:
        _built(TextGraph(frozen, put), family)
    onnx.checker.check_model(str(path))


def header(frozen: Frozen) -> onnx.ModelProto:
    """What `export` writes of `frozen`, its parameters without data.

    Raises UserError for a model that has no graph, and KeyError for what `frozen` lacks of it.
    """
    if why := refuse_model(frozen.config):
        raise UserError(f"export to onnx: {why}")
    family = FAMILIES[frozen.config["model_type"]]
    graph = _built(TextGraph(frozen.blank()), family)
    model = _model(graph, frozen, family)
    model.graph.initializer.extend(graph.constants.values())
    return model


def _built(graph: TextGraph, family: ModuleType) -> TextGraph:
    logits = family.build(graph, graph.frozen.config)
    graph.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="/logits"))
    return graph


def _model(graph: TextGraph, frozen: Frozen, family: ModuleType) -> onnx.ModelProto:
    layers, heads, dim = family.cache(frozen.config)
    ids: dict[str, str] = family.INPUTS
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", length]) for n, length in ids.items()]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, family.logits_shape(frozen.config))]
    for i in range(layers):
        for part in ("key", "value"):
            for name, length, into in ((f"past_key_values.{i}", "past", inputs), (f"present.{i}", "total", outputs)):
                shape = ["batch", heads, f"{length}_sequence", dim]
                into.append(helper.make_tensor_value_info(f"{name}.{part}", TensorProto.FLOAT, shape))
    made = helper.make_graph(graph.nodes, frozen.config["model_type"], inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="qat")
    told = {
        "config": frozen.config,
        "weights": {n: {"spec": w.tensor.spec.to_dict(), "kind": w.kind} for n, w in frozen.weights.items()},
        "inputs": {n: i.spec.to_dict() for n, i in frozen.inputs.items()},
        "ties": frozen.ties,
    }
    helper.set_model_props(model, {METADATA: json.dumps(told)})
    return model
