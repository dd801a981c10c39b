"""Nodes and initializers of a language model in ONNX: embeddings, linear layers, norms, attention with its KV cache.

Every parameter is an initializer under its Hugging Face name (packed codes with `.scale` and `.zero_point` beside
them), and the node that consumes it carries its module's path; names with a slash are ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from qat.exporters import onnx_int8
from qat.exporters.hf_layout import CONV1D
from qat.exporters.onnx_graph_base import GraphBase
from qat.exporters.onnx_nbits import encode
from qat.exporters.onnx_stream import announced
from qat.frozen import Frozen, FrozenWeight

MICROSOFT = "com.microsoft"
MASKED = float(np.finfo(np.float32).min)  # finite: a row of padding alone then is no NaN


class TextGraph(GraphBase):
    """Grows from the inputs to "logits"; methods return the name of the tensor they made, [batch, sequence, …]."""

    def __init__(self, frozen: Frozen, put: Callable[[str, Tensor], None] | None = None) -> None:
        """put: takes every initializer as it is made; `constants` then say names, types and shapes alone."""
        super().__init__(frozen)
        self.put = put
        self.masks: dict[int | None, str] = {}

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """An initializer; of the first value that the name is given, which may have no storage."""
        if self.put is None:
            return super().constant(name, value)
        if name not in self.constants:
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(value)
            self.constants[name] = announced(name, tensor)
            self.put(name, tensor)
        return name

    def stored(self, name: str, value: Tensor) -> str:
        """A constant that is of a quantized weight; without its data in a graph of `Frozen.blank`."""
        return self.constant(name, value.to("meta") if self.put is None else value)

    def parameter(self, name: str) -> str:
        """An unquantized parameter, in float32."""
        name = self.frozen.ties.get(name, name)
        return self.constant(name, self.frozen.floats[name].float())

    def weight(self, module: str) -> tuple[str, FrozenWeight | None]:
        """The name that a module's weight is held under, and what is held of it if it is quantized."""
        name = self.frozen.ties.get(f"{module}.weight", f"{module}.weight")
        return name, self.frozen.weights.get(name)

    def packed(self, name: str, held: FrozenWeight, zeros: bool) -> list[str]:
        """The initializers of a block-quantized weight: codes [N, K / bs, bytes], scales, and zero points if wanted."""
        names = [name, f"{name}.scale", f"{name}.zero_point"][: 3 if zeros else 2]
        if any(n not in self.constants for n in names):
            for part, value in zip(names, encode(held.tensor), strict=False):
                self.stored(part, value)
        return names

    def embedding(self, module: str, ids: str) -> str:
        """The rows that are looked up, float32 [batch, sequence, width]."""
        name, held = self.weight(module)
        if held is None:
            return self.add("Gather", [self.parameter(name), ids], module)
        if onnx_int8.is_row_wise(held.tensor.spec):
            return onnx_int8.embedding(self, module, ids, name, held)
        codes, *rest = self.packed(name, held, zeros=True)  # their default depends on the type of the codes
        rows, cols = held.tensor.shape
        # a view, so that a tied head and this table are stored once
        table = self.add("Reshape", [codes, self.ints(rows, -1)], f"{module}/table")
        return self.add(
            "GatherBlockQuantized",
            [table, ids, *rest],
            module,
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            bits=held.tensor.spec.type.bits,
            block_size=cols // held.tensor.scale.shape[1],
        )

    def linear(self, module: str, x: str) -> str:
        """x [..., K] -> [..., N], bias included, however the weight is held."""
        name, held = self.weight(module)
        if held is not None and onnx_int8.is_row_wise(held.tensor.spec):
            out = onnx_int8.linear(self, module, x, name, held, self.frozen.inputs.get(module))
        elif held is not None:
            out = self.matmul_nbits(module, x, name, held)
        elif name.endswith(CONV1D):
            out = self.add("MatMul", [x, self.parameter(name)], module)
        else:
            transposed = self.add("Transpose", [self.parameter(name)], f"{module}/transpose", perm=[1, 0])
            out = self.add("MatMul", [x, transposed], module)
        if self.frozen.ties.get(f"{module}.bias", f"{module}.bias") in self.frozen.floats:
            out = self.add("Add", [out, self.parameter(f"{module}.bias")], f"{module}/bias")
        return out

    def matmul_nbits(self, module: str, x: str, name: str, held: FrozenWeight) -> str:
        """x [..., K] -> [..., N] by ONNX Runtime's operator for packed blocks, without the bias."""
        rows, cols = held.tensor.shape
        return self.add(
            "MatMulNBits",
            [x, *self.packed(name, held, zeros=held.tensor.offset is not None)],  # without: the middle of the codes
            module,
            domain=MICROSOFT,
            N=rows,
            K=cols,
            bits=held.tensor.spec.type.bits,
            block_size=cols // held.tensor.scale.shape[1],
            accuracy_level=4 if module in self.frozen.inputs else 0,
        )

    def rms_norm(self, module: str, x: str, epsilon: float) -> str:
        """Over the last dimension, times the weight."""
        return self.add("RMSNormalization", [x, self.parameter(f"{module}.weight")], module, axis=-1, epsilon=epsilon)

    def layer_norm(self, module: str, x: str, epsilon: float) -> str:
        """Over the last dimension, with weight and bias."""
        parameters = [self.parameter(f"{module}.{p}") for p in ("weight", "bias")]
        return self.add("LayerNormalization", [x, *parameters], module, axis=-1, epsilon=epsilon)

    def activation(self, name: str, x: str, kind: str) -> str:
        """The function that transformers calls `kind`, one of ACTIVATIONS."""
        if kind in ("silu", "swish"):
            return self.add("Mul", [x, self.add("Sigmoid", [x], f"{name}/sigmoid")], name)
        if kind == "relu":
            return self.add("Relu", [x], name)
        return self.add("Gelu", [x], name, approximate="none" if kind == "gelu" else "tanh")

    def mask(self, window: int | None) -> str:
        """Added to attention scores, float32 [batch, 1, sequence, total]: 0, or MASKED where a token must not look."""
        if window in self.masks:
            return self.masks[window]
        at = f"/mask/{window or 'all'}"
        total = self.add("Shape", ["attention_mask"], f"{at}/total", start=1)
        new = self.add("Shape", ["input_ids"], f"{at}/new", start=1)
        zero, one = self.constant("/zero", np.array(0, np.int64)), self.constant("/one", np.array(1, np.int64))
        end = self.add("Squeeze", [total], f"{at}/end")
        first = self.add("Sub", [end, self.add("Squeeze", [new], f"{at}/count")], f"{at}/first")
        keys = self.add("Range", [zero, end, one], f"{at}/keys")
        queries = self.add("Range", [first, end, one], f"{at}/queries")
        queries = self.add("Unsqueeze", [queries, self.ints(-1)], f"{at}/column")
        seen = self.add("LessOrEqual", [keys, queries], f"{at}/causal")
        if window is not None:
            oldest = self.add("Sub", [queries, self.constant(f"{at}/size", np.array(window, np.int64))], f"{at}/oldest")
            seen = self.add("And", [seen, self.add("Greater", [keys, oldest], f"{at}/near")], f"{at}/seen")
        allowed = self.add("And", [seen, self.given()], f"{at}/allowed")
        self.masks[window] = self.add("Where", [allowed, self.number(0.0), self.number(MASKED)], at)
        return self.masks[window]

    def padding(self) -> str:
        """The same for a model that sees the whole text, [batch, 1, sequence, sequence]."""
        new = self.add("Shape", ["input_ids"], "/mask/new", start=1)
        one = self.ints(1)
        shape = self.add("Concat", [one, one, new, one], "/mask/shape", axis=0)
        allowed = self.add("Expand", [self.given(), shape], "/mask/allowed")
        return self.add("Where", [allowed, self.number(0.0), self.number(MASKED)], "/mask")

    def given(self) -> str:
        """Which tokens are no padding: bool [batch, 1, 1, total]."""
        if "/mask/given" not in {node.name for node in self.nodes}:
            is_there = self.add("Cast", ["attention_mask"], "/mask/bool", to=TensorProto.BOOL)
            self.add("Unsqueeze", [is_there, self.ints(1, 2)], "/mask/given")
        return "/mask/given:Unsqueeze"

    def attention(
        self, module: str, layer: int, qkv: list[str], heads: tuple[int, int], scale: float, mask: str
    ) -> str:
        """q, k, v [batch, sequence, heads * dim] and the layer's cache -> [batch, sequence, heads * dim]."""
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        return self.add(
            "Attention",
            [*qkv, mask, *past],
            f"{module}/attention",
            [f"{module}/attention:Attention", *present],
            q_num_heads=heads[0],
            kv_num_heads=heads[1],
            scale=scale,
        )


DECODER_INPUTS = {"input_ids": "sequence", "attention_mask": "total_sequence", "position_ids": "sequence"}
ACTIVATIONS = ("silu", "swish", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")
