"""An ONNX file's graph, changed where no tensor tells: verify names the node and what it was, without running it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import prepared_models
import pytest
import torch
from onnx import helper, numpy_helper
from prepared_models import INT4, rule
from tiny_text_models import byte_level_tokenizer, tiny, tokenizer_files
from torch import nn

from qat import cli
from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.exporters import export, onnx_stream
from qat.exporters.onnx_int8 import TENSOR, TOKEN
from qat.exporters.onnx_nbits import level_4
from qat.exporters.onnx_text_graph import MASKED
from qat.frozen import Frozen
from qat.models.sequential import describe
from qat.quantizers.bias import round_biases
from qat.scheme import QuantSpec
from qat.verification import verify

END = "<|endoftext|>"
WORDS = tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, unk_token=END)
ROW = QuantSpec(qtype="int8", block=(1, -1), scale="float32")
STATIC: dict[str, Any] = {"input": TENSOR, "static": True}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def decoder(kind: str, weight: QuantSpec = INT4, scheme: dict[str, Any] | None = None, **changes: Any) -> Frozen:
    model = prepare(tiny(kind, **changes), [rule(None, "lm_head"), rule(weight, **(scheme or {}))]).eval()
    if scheme == STATIC:
        calibrate(model, [torch.arange(64).reshape(2, 32)], lambda m, ids: m(input_ids=ids))
        freeze_observers(model)
    model.config.architectures = [type(model).__name__]
    return convert(model, tokenizer=WORDS)


def cnn() -> Frozen:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)]
    model = nn.Sequential(*layers).eval()
    config = describe(model, (1, 8, 8))
    prepare(model, [rule(ROW, kind="Conv2d|Linear", **STATIC)])
    calibrate(model, [torch.randn(8, 1, 8, 8)], lambda m, x: m(x))
    freeze_observers(model)
    round_biases(model)
    return convert(model, config=config)


MODELS: dict[str, Callable[[], Frozen]] = {
    "llama": lambda: decoder("llama", scheme={"input": level_4(32)}, intermediate_size=128),
    "llama3": lambda: decoder("llama", intermediate_size=128, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": lambda: decoder("mistral", ROW, {"input": TOKEN}, sliding_window=5),
    "qwen3": lambda: decoder("qwen3", ROW, STATIC),
    "gpt2": lambda: decoder("gpt2", scale_attn_by_inverse_layer_idx=True),
    "bert": lambda: prepared_models.prepared("bert", prepared_models.LINEAR)[1],
    "cnn": cnn,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model frozen, and its file as a stranger has it: without our manifest."""
    path = tmp_path_factory.mktemp("graphs")
    for name, make in MODELS.items():
        frozen = make()
        if "layers" not in frozen.config:
            frozen.tokenizer = WORDS
        frozen.save(path / name / "run" / "frozen")
        (export(frozen, "onnx", path / name / "onnx") / "manifest.json").unlink()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_equal(name: str, root: Path) -> None:
    assert verify(root / name / "onnx", against=root / name / "run", runtime=False).differences == []


Change = Callable[[onnx.ModelProto], None]


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def attribute(of: str, name: str, value: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (old,) = (a for a in node(model, of).attribute if a.name == name)
        old.CopyFrom(helper.make_attribute(name, value))

    return change


def constant(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(how(numpy_helper.to_array(tensor)), name))

    return change


def wire(of: str, index: int, to: str) -> Change:
    return lambda model: node(model, of).input.__setitem__(index, to)


def without(name: str) -> Change:
    """The node taken out: what used its output uses its first input."""

    def change(model: onnx.ModelProto) -> None:
        gone = node(model, name)
        model.graph.node.remove(gone)
        for other in model.graph.node:
            other.input[:] = [gone.input[0] if i == gone.output[0] else i for i in other.input]

    return change


def negated(model: onnx.ModelProto) -> None:
    """A node of a stranger's before the last one."""
    last = model.graph.node.pop()
    model.graph.node.append(helper.make_node("Neg", list(last.input), ["negated"], name="/neg"))
    model.graph.node.append(helper.make_node(last.op_type, ["negated"], list(last.output), name=last.name))


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def renamed_axis(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


MASK = f"/float/{MASKED!r}"
Q = "model.layers.1.self_attn"
DAMAGE: list[tuple[str, Change, str]] = [
    ("llama", attribute("model.layers.0.input_layernorm", "epsilon", 1e-3), "epsilon is 0.001 in the file, not 1e-06"),
    ("llama", constant("/rope/frequencies", lambda x: x * 0.5), "/rope/frequencies[0] is 0.5 in the file, not 1.0"),
    ("llama3", constant("/rope/frequencies", lambda x: np.append(x[:-1], x[-1:] * 8)), "constant /rope/frequencies[7]"),
    ("llama", constant(MASK, lambda x: x * 0), "is -0.0 in the file, not -3.4028235e+38"),
    ("llama", attribute(f"{Q}/attention", "kv_num_heads", 4), "kv_num_heads is 4 in the file, not 2"),
    ("llama", attribute(f"{Q}.q_proj", "bits", 4.0), "the type of bits is FLOAT in the file, not INT"),
    ("llama", attribute(f"{Q}/attention", "scale", 0.5), f"node {Q}/attention: scale is 0.5 in the file, not 0.25"),
    ("llama", attribute(f"{Q}/rotate_q", "num_heads", 2), "num_heads is 2 in the file, not 4"),
    ("llama", wire(f"{Q}/rotate_q", 0, f"{Q}.k_proj:MatMulNBits"), f"node {Q}/rotate_q: input 0 is {Q}.k_proj:MatMul"),
    ("llama", without("model.layers.0.mlp/residual"), "node model.layers.0.mlp/residual (Add) is missing"),
    ("llama", negated, "node /logits: input 0 is negated in the file"),
    ("llama", renamed_axis, "its input 0 is input_ids: int64 [batch, 7] in the file, not input_ids: int64 [batch, seq"),
    ("mistral", constant("/mask/5/size", lambda x: x + 1), "constant /mask/5/size is 6 in the file, not 5"),
    ("mistral", constant("/float/127.0", lambda x: x + 1), "constant /float/127.0 is 128.0 in the file, not 127.0"),
    ("mistral", constant("/float/127.0", lambda x: np.nextafter(x, 200)), "is 127.00001 in the file, not 127.0"),
    ("qwen3", constant(f"/zeros/{Q}.q_proj", lambda x: x + 1), f"constant /zeros/{Q}.q_proj[0] is 1 in the file"),
    ("gpt2", attribute("transformer.h.1.attn/attention", "scale", 0.25), "scale is 0.25 in the file, not 0.125"),
    ("gpt2", attribute("transformer.h.0.mlp/act", "approximate", "none"), "approximate is none in the file, not tanh"),
    ("gpt2", opset, "opset ai.onnx is 24 in the file, not 23"),
    ("bert", attribute("bert.embeddings.LayerNorm", "epsilon", 1e-5), "epsilon is 1e-05 in the file, not 1e-12"),
    ("bert", wire("/mask/bool", 0, "token_type_ids"), "input 0 is token_type_ids in the file, not attention_mask"),
    ("cnn", attribute("0", "pads", [0, 1, 2, 1]), "node 0: pads is [0, 1, 2, 1] in the file, not [1, 1, 1, 1]"),
    ("cnn", without("2"), "node 2 (MaxPool) is missing from the file"),
]


@pytest.mark.parametrize(("name", "change", "said"), DAMAGE, ids=[f"{n}-{s[:40]}" for n, _, s in DAMAGE])
def test_a_changed_graph_is_named(
    name: str, change: Change, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(name, change, root, tmp_path, capsys)


def refused(name: str, change: Change, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `qat verify` says of a changed file, in one line; it ends with code 3."""
    model = onnx.load(root / name / "onnx/model.onnx")
    change(model)
    onnx.save(model, tmp_path / "model.onnx")
    for file, content in (WORDS if name != "cnn" else {}).items():
        (tmp_path / file).write_bytes(content)
    code = cli.main(["verify", str(tmp_path), "--against", str(root / name / "run"), "--no-runtime"])
    said = capsys.readouterr()
    assert code == 3, said
    return " ".join(said.err.split())


def test_another_accuracy_level_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change = attribute(f"{Q}.q_proj", "accuracy_level", 0)
    assert f"{Q}.q_proj: MatMulNBits does not compute" in refused("llama", change, root, tmp_path, capsys)


def test_other_formats_tell_of_the_graph_too(root: Path, tmp_path: Path) -> None:
    """A config.json, and what GGUF metadata say of one."""
    model = onnx.load(root / "llama3/onnx/model.onnx")
    attribute("model.norm", "epsilon", 1e-3)(model)
    onnx.save(model, tmp_path / "model.onnx")
    frozen = Frozen.load(root / "llama3/run/frozen")
    for kind in ("hf", "gguf"):
        base = export(frozen, kind, tmp_path / kind)
        assert verify(root / "llama3/onnx", against=base, runtime=False).differences == []
        (said,) = verify(tmp_path / "model.onnx", against=base, runtime=False).differences
        assert said == "the graph: node model.norm: epsilon is 0.001 in the file, not 1e-06"


def test_a_window_that_gguf_does_not_tell_is_no_difference(tmp_path: Path) -> None:
    frozen = decoder("mistral", sliding_window=5, intermediate_size=128)
    files = {kind: export(frozen, kind, tmp_path / kind) for kind in ("gguf", "onnx")}
    assert verify(files["onnx"], against=files["gguf"], runtime=False).differences == []


def test_another_network_is_a_difference(tmp_path: Path) -> None:
    """Whose layers have the same names, and weights that the file's shapes do not fit."""
    models = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5)), nn.Sequential(nn.Linear(64, 16))]
    models[1].extend([nn.ReLU(), nn.Linear(16, 5)])
    for model, name, shape in zip(models, ("file", "run"), ((1, 8, 8), (64,)), strict=True):
        config = describe(model, shape)
        frozen = convert(prepare(model, [rule(ROW, kind="Conv2d|Linear")]), config=config)
        frozen.save(tmp_path / name / "frozen")
        export(frozen, "onnx", tmp_path / name / "onnx")
    found = verify(tmp_path / "file/onnx", against=tmp_path / "run", runtime=False).differences
    assert any("do not make a graph" in said for said in found), found


def test_data_beside_the_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_stream, "PROTOBUF_LIMIT", 1)
    frozen = Frozen.load(root / "llama/run/frozen")
    folder = export(frozen, "onnx", tmp_path / "onnx")
    assert (folder / "model.onnx.data").is_file()
    assert verify(folder, against=root / "llama/run", runtime=False).differences == []
