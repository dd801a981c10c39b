"""What the builders of ONNX graphs share: nodes, and initializers that are made once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from qat.exporters.onnx_stream import announced
from qat.frozen import Frozen, FrozenInput


class GraphBase:
    """Methods return the name of the tensor they made."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        """A node of this name; outputs: their names, if one made from `name` will not do."""
        made = list(outputs) or [f"{name}:{op}"]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **attributes))
        return made[0]

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        """An initializer; of the first value that the name is given. One of `Frozen.blank` has no data."""
        if name in self.constants:
            return name
        if isinstance(value, Tensor) and value.is_meta:
            self.constants[name] = announced(name, value)
        else:
            array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def stored(self, name: str, value: Tensor) -> str:
        """A constant that is of a quantized weight."""
        return self.constant(name, value)

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant("/ints/" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"/float/{value!r}", np.array(value, np.float32))

    def fixed_grid(self, x: str, module: str, given: FrozenInput, at: str) -> str:
        """x on the static input grid of a layer: codes and back, by nodes called AT/quantize and AT/dequantize."""
        assert given.scale is not None  # a static input has one
        zero = torch.zeros((), dtype=torch.int32) if given.offset is None else given.offset.reshape(())
        grid = [
            self.constant(f"{module}.input.scale", given.scale.float().reshape(())),
            self.constant(f"{module}.input.zero_point", zero.to(given.spec.type.storage)),
        ]
        codes = self.add("QuantizeLinear", [x, *grid], f"{at}/quantize")
        return self.add("DequantizeLinear", [codes, *grid], f"{at}/dequantize")
