"""What the builders of ONNX graphs share: nodes, and initializers that are made once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from qat.frozen import Frozen


class GraphBase:
    """Methods return the name of the tensor they made."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        made = list(outputs) or [f"{name}:{op}"]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **attributes))
        return made[0]

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        if name not in self.constants:
            array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant("/ints/" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        return self.constant(f"/float/{value!r}", np.array(value, np.float32))
