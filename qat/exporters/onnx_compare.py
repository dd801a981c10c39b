"""How the graph of an ONNX file differs from the one that its exporter writes: all that a runtime obeys but parameters.

Nodes are told apart by name, so that their order is free, as it is to a runtime.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

CLOSE = 1e-6  # relative, of tables: another processor may have computed their last bits otherwise
_ABSENT = AttributeProto.UNDEFINED, None


def difference(have: ModelProto, want: ModelProto, folder: Path) -> list[str]:
    """The first difference in one sentence; nothing if both compute the same.

    Initializers of `want` without data are parameters, of which dtype and shape are compared. folder: where the
    external data of `have` lie. Raises ValueError or OSError if these cannot be read.
    """
    for said in (_opsets(have, want), _nodes(have, want), _ends(have, want), _constants(have, want, folder)):
        if said:
            return [f"the graph: {said}"]
    return []


def _opsets(have: ModelProto, want: ModelProto) -> str | None:
    if have.functions:
        return f"the file defines a function of its own, {have.functions[0].name}"
    a, b = ({o.domain or "ai.onnx": o.version for o in m.opset_import} for m in (have, want))
    return next((_not(f"opset {d}", a.get(d), b.get(d)) for d in sorted({*a, *b}) if a.get(d) != b.get(d)), None)


def _nodes(have: ModelProto, want: ModelProto) -> str | None:
    found = {n.name: n for n in have.graph.node}
    for node in want.graph.node:
        if node.name not in found:
            return f"node {node.name} ({node.op_type}) is missing from the file"
        if said := _node(found.pop(node.name), node):
            return f"node {node.name}: {said}"
    for name, node in found.items():
        return f"node {name} ({node.op_type}) is in the file, and the exporter writes none of that name"
    return None if len(have.graph.node) == len(want.graph.node) else "two nodes in the file have one name"


def _node(have: NodeProto, want: NodeProto) -> str | None:
    a, b = (f"{n.domain}.{n.op_type}".removeprefix("ai.onnx.").lstrip(".") for n in (have, want))
    if a != b:
        return _not("the operator", a, b)
    for what, x, y in (("input", have.input, want.input), ("output", have.output, want.output)):
        for i, (one, other) in enumerate(zip_longest(x, y)):
            if one != other:
                return _not(f"{what} {i}", one, other)
    x, y = ({k.name: (k.type, helper.get_attribute_value(k)) for k in n.attribute} for n in (have, want))
    for k in sorted({*x, *y}):
        (kind, value), (other, wanted) = x.get(k, _ABSENT), y.get(k, _ABSENT)
        if value != wanted:
            return _not(k, value, wanted)
        if kind != other:  # to Python 1 is 1.0
            return _not(f"the type of {k}", *(AttributeProto.AttributeType.Name(t) for t in (kind, other)))
    return None


def _ends(have: ModelProto, want: ModelProto) -> str | None:
    """Inputs and outputs of the graph, whose order counts."""
    for what, x, y in (("input", have.graph.input, want.graph.input), ("output", have.graph.output, want.graph.output)):
        for i, (one, other) in enumerate(zip_longest(map(_end, x), map(_end, y))):
            if one != other:
                return _not(f"its {what} {i}", one, other)
    return None


def _end(value: ValueInfoProto) -> str:
    kind = value.type.tensor_type
    sizes = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in kind.shape.dim]
    return f"{value.name}: {_typed(kind.elem_type, sizes)}"


def _constants(have: ModelProto, want: ModelProto, folder: Path) -> str | None:
    if have.graph.sparse_initializer:
        return f"constant {have.graph.sparse_initializer[0].values.name} is sparse in the file"
    found = {t.name: t for t in have.graph.initializer}
    for tensor in want.graph.initializer:
        if tensor.name not in found:
            return f"constant {tensor.name} is missing from the file"
        if said := _constant(found.pop(tensor.name), tensor, folder):
            return f"constant {tensor.name}{said}"
    return next((f"constant {name} is in the file, and the exporter writes none of that name" for name in found), None)


def _constant(have: TensorProto, want: TensorProto, folder: Path) -> str | None:
    a, b = (_typed(t.data_type, t.dims) for t in (have, want))
    if a != b:
        return _not("", a, b)
    if not want.raw_data:  # a parameter
        return None
    x, y = numpy_helper.to_array(have, str(folder)).ravel(), numpy_helper.to_array(want).ravel()
    table = y.size > 1 and np.issubdtype(y.dtype, np.floating)
    apart = ~np.isclose(x, y, rtol=CLOSE, atol=0) if table else x != y
    if not apart.any():
        return None
    at = int(apart.argmax())
    return _not(f"[{at}]" if want.dims else "", x[at], y[at])


def _typed(kind: int, sizes: Sequence[Any]) -> str:
    name = TensorProto.DataType.Name(kind).lower() if kind in TensorProto.DataType.values() else str(kind)
    return f"{name} [{', '.join(map(str, sizes))}]"


def _not(what: str, have: Any, want: Any) -> str:
    return f"{what} is {_said(have)} in the file, not {_said(want)}"


def _said(value: Any) -> str:
    """A number as float32 says it, text as it is."""
    if value is None:
        return "absent"
    if isinstance(value, bytes):
        return value.decode(errors="replace")[:80]
    return str(np.float32(value)) if isinstance(value, float) else str(value)[:80]
