"""What a consumer obeys beside the tensors, changed without a manifest to tell: verify finds it in every format."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text_models import INT4, byte_level_tokenizer, freeze, tiny, tokenizer_files

from qat import cli
from qat.conversion import convert, prepare
from qat.errors import VerifyError
from qat.exporters import export
from qat.frozen import Frozen
from qat.scheme import QuantSpec, Rule, Scheme
from qat.verification import verify

END = "<|endoftext|>"
WORDS = tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, unk_token=END)
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
KINDS = ["gguf", "hf", "torchao", "gptq", "gptq_v1", "awq", "mlx", "onnx"]


def model(**changes: Any) -> Any:
    shape = {"intermediate_size": 128, "tie_word_embeddings": False, "rope_parameters": ROPE}
    made = tiny("llama", **{**shape, **changes})
    made.config.architectures = [type(made).__name__]
    return made


def frozen_of(scheme: Scheme, **changes: Any) -> Frozen:
    rules = [Rule(path="lm_head"), Rule(type="Linear", scheme=scheme)]
    return convert(prepare(model(**changes), rules), tokenizer=WORDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 weights in every format, as others' tools leave them: without our manifest."""
    pytest.importorskip("torchao")
    frozen = frozen_of(Scheme(weight=QuantSpec(qtype="int4", block=(1, 32))))
    path = tmp_path_factory.mktemp("damage")
    frozen.save(path / "run" / "frozen")
    for kind in KINDS:
        export(frozen, kind, path / kind)
        (path / kind / "manifest.json").unlink()
    return path


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(root / kind, tmp_path / kind))


def differences(path: Path, base: Path) -> list[str]:
    return verify(path, against=base, runtime=False).differences


@pytest.mark.parametrize("kind", ["gptq_v1", "gguf", "run/frozen"])  # test_verify_pairs has the others
def test_every_format_against_every_other(kind: str, root: Path) -> None:
    for other in [*KINDS, "run/frozen"]:
        assert differences(root / kind, root / other) == [], other
        assert differences(root / other, root / kind) == [], other


CHANGES: list[tuple[str, str, Any]] = [
    ("gptq", "group_size", 64),
    ("gptq", "sym", False),
    ("gptq", "desc_act", True),
    ("awq", "group_size", 64),
    ("awq", "zero_point", False),
    ("awq", "modules_to_not_convert", []),
    ("torchao", "quant_type", {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}, "_version": 2}}),
    ("hf", "ignore", []),
]


@pytest.mark.parametrize(("kind", "key", "value"), CHANGES, ids=lambda x: str(x)[:20])
def test_how_the_weights_are_packed_is_compared(
    kind: str, key: str, value: Any, copy: Callable[[str], Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy(kind) / "config.json"
    config = json.loads(file.read_text())
    assert key in config["quantization_config"]
    config["quantization_config"][key] = value
    file.write_text(json.dumps(config))
    assert cli.main(["verify", str(file.parent), "--against", str(root / "run"), "--no-runtime"]) == 3
    assert f"quantization_config.{key}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["hf", "torchao", "gptq", "awq", "mlx"])
def test_the_model_is_compared_whole(kind: str, copy: Callable[[str], Path], root: Path) -> None:
    file = copy(kind) / "config.json"
    whole = json.loads(file.read_text())
    wrong = {
        "rms_norm_eps": {**whole, "rms_norm_eps": 0.5},
        "rope_parameters": {**whole, "rope_parameters": {**whole["rope_parameters"], "rope_theta": 1e4}},
        "attention_bias": {k: v for k, v in whole.items() if k != "attention_bias"},
        "dtype": {**whole, "dtype": "bfloat16"},
        "rope_scaling": {**whole, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    }
    for key, config in wrong.items():
        file.write_text(json.dumps(config))
        (said,) = differences(file.parent, root / "run")
        assert said.startswith(f"config {key} is"), said


METADATA: dict[str, Callable[[Any], Any]] = {
    "llama.rope.freq_base": lambda x: x * 2,
    "llama.rope.dimension_count": lambda x: x // 2,
    "llama.context_length": lambda x: x // 2,
    "llama.attention.layer_norm_rms_epsilon": lambda x: x * 2,
    "tokenizer.ggml.bos_token_id": lambda x: x + 1,
    "tokenizer.ggml.add_bos_token": lambda x: ~x,
}


def change_metadata(file: Path, key: str, how: Callable[[Any], Any]) -> None:
    reader = gguf.GGUFReader(file, "r+")
    value = reader.fields[key].parts[-1]
    value[:] = how(value)
    reader.data.flush()


@pytest.mark.parametrize("key", METADATA)
def test_the_metadata_of_gguf_is_compared(key: str, copy: Callable[[str], Path], root: Path) -> None:
    folder = copy("gguf")
    change_metadata(folder / "model.gguf", key, METADATA[key])
    for base in ("run", "hf", "gguf"):
        assert any(f" {key} " in d for d in differences(folder, root / base)), base


def test_torchaos_zero_points_of_a_symmetric_grid(copy: Callable[[str], Path], root: Path) -> None:
    file = copy("torchao") / "model.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    stored = load_file(file)
    stored["model.layers.0.mlp.up_proj._weight_zero_point"] += 1
    save_file(stored, file, metadata)
    assert "up_proj.weight: the codes are equal but one has a zero point" in differences(file.parent, root / "run")[0]


def test_what_torchao_rebuilds_its_tensors_from(copy: Callable[[str], Path], root: Path) -> None:
    file = copy("torchao") / "model.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    stored = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for old, new in (
        ("float32", "bfloat16"),
        ("activation_quantization", "activation_quantizatioN"),
        ("[1, 32]", "[3, 32]"),
    ):
        assert old in metadata[name]
        save_file(stored, file, {**metadata, name: metadata[name].replace(old, new)})
        assert differences(file.parent, root / "run")[0].startswith(f"config safetensors.{name}._data")


@pytest.mark.parametrize("kind", ["hf", "onnx", "mlx", "gguf"])
def test_a_missing_tokenizer_is_a_difference(kind: str, copy: Callable[[str], Path], root: Path) -> None:
    folder = copy(kind)
    if kind == "gguf":
        tokens = gguf.GGUFReader(folder / "model.gguf", "r+").fields["tokenizer.ggml.tokens"]
        plain = next(i for i in tokens.data[300:] if bytes(tokens.parts[i]).isalpha())
        tokens.parts[plain][:1] = ord("Z")
        tokens.parts[plain].base.flush()  # pyright: ignore
    for name in WORDS if kind != "gguf" else ():
        (folder / name).unlink()
    assert any("tokenizer" in d for d in differences(folder, root / "run"))


def test_metadata_that_is_no_text(copy: Callable[[str], Path], root: Path) -> None:
    folder = copy("gguf")
    tokens = gguf.GGUFReader(folder / "model.gguf", "r+").fields["tokenizer.ggml.tokens"]
    tokens.parts[tokens.data[300]][0] = 0xFF
    tokens.parts[tokens.data[300]].base.flush()  # pyright: ignore
    with pytest.raises(VerifyError, match=r"model\.gguf"):
        verify(folder, against=root / "run", runtime=False)


TOKEN = QuantSpec(qtype="int8", block=(1, -1), divide="reciprocal", scale="float32")
INT8 = QuantSpec(qtype="int8")
Q8_0 = QuantSpec(qtype="int8", block=(1, 32))


def test_inputs_are_compared_both_ways(tmp_path: Path) -> None:
    folders = {}
    for name, scheme in {"float": Scheme(weight=INT8), "int8": Scheme(weight=INT8, input=TOKEN)}.items():
        frozen = frozen_of(scheme)
        frozen.save(tmp_path / name)
        folders[name] = export(frozen, "hf", tmp_path / f"hf {name}")
    assert differences(folders["int8"], tmp_path / "int8") == []
    assert "is dynamic qtype=int8" in differences(folders["int8"], tmp_path / "float")[0]
    assert "is float in the file, dynamic qtype=int8" in differences(folders["float"], tmp_path / "int8")[0]
    file = folders["int8"] / "config.json"
    (folders["int8"] / "manifest.json").unlink()
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    file.write_text(json.dumps(config))
    assert "is float in the file" in differences(folders["int8"], tmp_path / "int8")[0]


def test_inputs_that_llama_cpp_does_not_compute(tmp_path: Path) -> None:
    frozen_of(Scheme(weight=Q8_0, input=TOKEN)).save(tmp_path / "int8")
    path = export(frozen_of(Scheme(weight=Q8_0)), "gguf", tmp_path / "gguf")
    assert (
        "the input of model.layers.0.self_attn.q_proj: llama.cpp quantizes" in differences(path, tmp_path / "int8")[0]
    )


def test_a_frozen_folder_is_compared_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = root / "run" / "frozen"
    assert cli.main(["verify", str(frozen), "--against", str(root / "hf")]) == 0
    other = Frozen.load(frozen)
    other.config = {**other.config, "rms_norm_eps": 0.5}
    other.floats = {**other.floats, "model.norm.weight": other.floats["model.norm.weight"] + 1}
    other.save(tmp_path / "other")
    assert cli.main(["verify", str(tmp_path / "other"), "--against", str(frozen)]) == 3
    assert "model.norm.weight" in capsys.readouterr().err


def test_a_run_is_compared_with_what_is_asked(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    shutil.copytree(root / "hf", run / "export" / "hf")
    assert cli.main(["verify", str(run), "--no-runtime"]) == 0
    assert "tokenizer equal" not in capsys.readouterr().out
    other = Frozen.load(root / "run" / "frozen")
    other.config = {**other.config, "rms_norm_eps": 0.5}
    other.save(tmp_path / "other")
    assert cli.main(["verify", str(run), "--no-runtime", "--against", str(tmp_path / "other")]) == 3
    assert "rms_norm_eps" in capsys.readouterr().err


def test_the_float_original_is_compared_whole(tmp_path: Path) -> None:
    original = model(tie_word_embeddings=True)
    original.save_pretrained(tmp_path / "float")
    for name, content in WORDS.items():
        (tmp_path / "float" / name).write_bytes(content)
    right = freeze(original, WORDS, replace(INT4, scale="float16"))
    right = replace(right, config={k: v for k, v in right.config.items() if k != "name"})
    wrong = {
        "model.norm.weight: the unquantized": replace(
            right, floats={**right.floats, "model.norm.weight": torch.ones(64)}
        ),
        "rms": replace(right, config={**right.config, "rms_norm_eps": 0.5}),
        "tokenizer": replace(right, tokenizer=tokenizer_files(byte_level_tokenizer("llama-bpe"), unk_token=END)),
    }
    for kind in ("gguf", "hf"):
        assert differences(export(right, kind, tmp_path / kind), tmp_path / "float") == []
        for said, frozen in wrong.items():
            assert any(said in d for d in differences(export(frozen, kind, tmp_path / kind), tmp_path / "float")), said


def test_the_bytes_of_one_file_are_its_own(root: Path) -> None:
    file = root / "gguf" / "model.gguf"
    assert verify(file, runtime=False).figures["bytes"] == file.stat().st_size
