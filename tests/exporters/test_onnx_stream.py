"""An ONNX file written tensor by tensor: protobuf's own bytes, nothing left out or out of order, sizes as announced."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from qat.exporters import onnx_stream
from qat.exporters.onnx_stream import OnnxWriter, announced

TENSORS = {
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "ids": torch.arange(5, dtype=torch.int64),
    "codes": torch.arange(40_000).to(torch.uint8).reshape(200, 200),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "half": torch.ones(3, dtype=torch.float16),
}


def bare() -> ModelProto:
    nodes = [helper.make_node("Identity", ["codes"], ["out"])]
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("out", TensorProto.UINT8, [200, 200])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], producer_name="qat")
    helper.set_model_props(model, {"told": "é"})
    return model


def written(path: Path, tensors: dict[str, Tensor]) -> bytes:
    with OnnxWriter(path, bare(), {n: announced(n, t.to("meta")) for n, t in TENSORS.items()}) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    return path.read_bytes()


def test_the_bytes_are_protobufs(tmp_path: Path) -> None:
    model = bare()
    for name, tensor in TENSORS.items():
        model.graph.initializer.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
    assert written(tmp_path / "m.onnx", TENSORS) == model.SerializeToString(deterministic=True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_beyond_a_protobuf_file_the_bytes_are_onnxs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bare()
    for name, tensor in TENSORS.items():
        model.graph.initializer.append(numpy_helper.from_array(tensor.contiguous().numpy(), name))
    (tmp_path / "theirs").mkdir()
    onnx.save_model(
        model, tmp_path / "theirs/m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=4096
    )
    monkeypatch.setattr(onnx_stream, "PROTOBUF_LIMIT", 40_000)
    written(tmp_path / "m.onnx", TENSORS)
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_tensor_that_is_not_the_next_one_announced_or_does_not_come_is_an_error(tmp_path: Path) -> None:
    fewer = dict(list(TENSORS.items())[:-1])
    with pytest.raises(ValueError, match="half was announced and did not come"):
        written(tmp_path / "m.onnx", fewer)
    for wrong in (dict(reversed(TENSORS.items())), {"scalar": torch.zeros(2)}, TENSORS | {"more": torch.zeros(1)}):
        with pytest.raises(ValueError, match="not the next tensor that was announced"):
            written(tmp_path / "m.onnx", wrong)
