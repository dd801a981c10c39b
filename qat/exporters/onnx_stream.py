"""An ONNX file written tensor by tensor: the bytes that protobuf makes of the whole model, without holding it.

A protobuf message is its fields in the order of their numbers, each a tag, a length and that many bytes. So the file is
what comes before the initializers (field 5 of the graph, which is field 7 of the model), these, and what comes after.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx.external_data_helper import set_external_data
from torch import Tensor

from qat.streams import raw

PROTOBUF_LIMIT = 2**31 - 2**24  # bytes of one protobuf file; larger models keep their tensors in model.onnx.data
SMALL = 4096  # bytes of a tensor below which it stays in model.onnx


def announced(name: str, tensor: Tensor) -> TensorProto:
    """An initializer without its data; the tensor may be one without storage."""
    dtype = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=tensor.dtype).numpy().dtype)
    return TensorProto(dims=tensor.shape, data_type=dtype, name=name)


class OnnxWriter:
    """`path` from `model`, which has no initializers yet, and from tensors that `put` takes in the order of `infos`.

    infos: of every initializer what `announced` says of it. Where one message cannot hold them, those that are not
    small lie one after the other in `path`.data, to which the file refers.
    """

    def __init__(self, path: Path, model: ModelProto, infos: Mapping[str, TensorProto]) -> None:
        self.path, self.model, self.infos = path, model, infos
        self.left = iter(infos)
        self.beside = sum(_nbytes(t) for t in infos.values()) >= PROTOBUF_LIMIT
        self.after = b""
        if self.beside:
            self.file = path.with_name(f"{path.name}.data").open("wb")
            return
        graph: GraphProto = model.graph
        size = sum(_field_size(_tensor_size(t)) for t in infos.values())
        begin, end = _fields(graph, 0, 5), _fields(graph, 6, 99)
        self.file = path.open("wb")
        self.file.write(_fields(model, 0, 7) + _tag(7, len(begin) + size + len(end)) + begin)
        self.after = end + _fields(model, 8, 99)

    def put(self, name: str, tensor: Tensor) -> None:
        """Raises ValueError for a tensor that is not the next one that was announced."""
        info = self.infos.get(name)
        if next(self.left, None) != name or info != announced(name, tensor):
            raise ValueError(f"{name} is {announced(name, tensor)}, not the next tensor that was announced")
        assert info is not None
        data = raw(tensor)
        if not self.beside:
            self.file.write(_tag(5, _tensor_size(info)) + _head(info))
            self.file.write(data)
            return
        held = self.model.graph.initializer.add()
        held.CopyFrom(info)
        if len(data) < SMALL:
            held.raw_data = bytes(data)
            return
        held.raw_data = b""  # set_external_data asks for the field
        set_external_data(held, f"{self.path.name}.data", self.file.tell(), len(data))
        held.ClearField("raw_data")
        self.file.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Raises ValueError if a tensor is missing."""
        with self.file:
            self.file.write(self.after)
        if error is not None:
            return
        if (name := next(self.left, None)) is not None:
            raise ValueError(f"{name} was announced and did not come")
        if self.beside:
            self.path.write_bytes(self.model.SerializeToString(deterministic=True))


def _nbytes(info: TensorProto) -> int:
    return helper.tensor_dtype_to_np_dtype(info.data_type).itemsize * torch.Size(info.dims).numel()


def _head(info: TensorProto) -> bytes:
    """A tensor's message up to its data, which is the last of its fields."""
    return info.SerializeToString(deterministic=True) + _tag(9, _nbytes(info))


def _tensor_size(info: TensorProto) -> int:
    return len(_head(info)) + _nbytes(info)


def _field_size(length: int) -> int:
    """Bytes of a field, all of whose numbers here fit one byte of tag, with content of that length."""
    return len(_tag(1, length)) + length


def _tag(number: int, length: int) -> bytes:
    """What stands before a field of bytes: its number with wire type 2, and its length in sevens of bits, low first."""
    out = bytearray([number << 3 | 2])
    while length >= 128:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length])


def _fields(message: Any, start: int, stop: int) -> bytes:
    """The bytes of a message's fields whose numbers are in range(start, stop)."""
    part = type(message)()
    part.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.number not in range(start, stop):
            part.ClearField(field.name)
    return part.SerializeToString(deterministic=True)
