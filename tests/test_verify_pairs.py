"""Any export against any other, and what is injected into one tensor of each: named, with its effect, exit code 3."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from prepared_models import INT4, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_text_models import byte_level_tokenizer, tiny, tokenizer_files

from qat import cli
from qat.conversion import convert, prepare
from qat.exporters import export
from qat.verification import verify

FOLDERS = ["hf", "gptq", "awq", "mlx", "torchao"]
KINDS = ["gguf", "onnx", *FOLDERS]
END = "<|endoftext|>"
GRID = replace(INT4, scale="float16")  # which is not exact in bfloat16
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral's int4 weights in every format, as others' tools leave them: without our manifest."""
    pytest.importorskip("torchao")
    model = tiny("mistral", tie_word_embeddings=False, intermediate_size=128, sliding_window=None)
    model.config.architectures = [type(model).__name__]
    files = tokenizer_files(byte_level_tokenizer("smaug-bpe"), bos_token=END, eos_token=END, unk_token=END)
    frozen = convert(prepare(model, [rule(None, "lm_head"), rule(GRID)]), tokenizer=files)
    path = tmp_path_factory.mktemp("pairs")
    frozen.save(path / "run" / "frozen")
    for kind in KINDS:
        export(frozen, kind, path / kind)
        (path / kind / "manifest.json").unlink()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_equal(kind: str, root: Path) -> None:
    for other in [*KINDS, "run", "run/frozen"]:
        verdict = verify(root / kind, against=root / other, runtime=False)
        assert verdict.differences == [], other
        assert verdict.figures["codes_equal"] is verdict.figures["weights_equal"] is True, other


MODULE = "model.layers.0.self_attn.q_proj."
CODES = {
    "gguf": "blk.0.attn_q.weight",
    "onnx": f"{MODULE}weight",
    "hf": f"{MODULE}weight_packed",
    "gptq": f"{MODULE}qweight",
    "awq": f"{MODULE}qweight",
    "mlx": f"{MODULE}weight",
    "torchao": f"{MODULE}_weight_qdata",
}
SCALES = {
    **CODES,
    "onnx": f"{MODULE}weight.scale",
    "hf": f"{MODULE}weight_scale",
    **dict.fromkeys(("gptq", "awq", "mlx"), f"{MODULE}scales"),
    "torchao": f"{MODULE}_weight_scale",
}


def change(folder: Path, name: str, part: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite one stored tensor of a format, its `codes` as bytes, its `scales` in their dtype."""
    if name.startswith("blk"):
        (tensor,) = (t for t in gguf.GGUFReader(folder / "model.gguf", "r+").tensors if t.name == name)
        blocks = tensor.data.reshape(len(tensor.data), -1, 18)
        at = blocks[..., 2:] if part == "codes" else blocks[..., :2]
        old = np.ascontiguousarray(at).view(np.uint8 if part == "codes" else np.float16)
        at[:] = how(old).view(np.uint8).reshape(at.shape)
        tensor.data.base.flush()
    elif (folder / "model.onnx").is_file():
        model = onnx.load(folder / "model.onnx")
        (tensor,) = (i for i in model.graph.initializer if i.name == name)
        changed = how(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
        onnx.save(model, folder / "model.onnx")
    else:
        with safe_open(folder / "model.safetensors", "pt") as f:
            metadata = f.metadata()
        stored = load_file(folder / "model.safetensors")
        old = stored[name].numpy()
        new = how(old.view(np.uint8) if part == "codes" else old).view(old.dtype)
        stored[name] = torch.from_numpy(np.ascontiguousarray(new)).view(stored[name].dtype)
        save_file(stored, folder / "model.safetensors", metadata)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x.copy()).bfloat16().to(torch.from_numpy(x[:0].copy()).dtype).numpy()


def one_step(x: np.ndarray) -> np.ndarray:
    """The first scale moved by one unit in the last place."""
    x = x.copy()
    x.flat[0] = np.nextafter(x.flat[0], x.dtype.type(np.inf))
    return x


def told(capsys: pytest.CaptureFixture[str], path: Path, root: Path) -> str:
    """What `qat verify` says of a damaged export; it ends with code 3."""
    code = cli.main(["verify", str(path), "--against", str(root / "run"), "--no-runtime"])
    said = capsys.readouterr()
    assert code == 3, said
    return said.out + said.err


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(root / kind, tmp_path / kind))


def swapped(x: np.ndarray) -> np.ndarray:
    return (x >> 4) | (x << 4)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "torchao"])  # which keeps a byte for each code
def test_swapped_nibbles_are_named(
    kind: str, copy: Callable[[str], Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy(kind)
    change(path, CODES[kind], "codes", swapped)
    said = told(capsys, path, root)
    assert f"{NAME}: " in said
    assert "nibbles" in said
    assert "dB SQNR" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "words"), [(one_step, "off by one unit"), (to_bfloat16, "rounded to bfloat16")])
def test_a_changed_scale_is_named(
    kind: str,
    how: Callable[[np.ndarray], np.ndarray],
    words: str,
    copy: Callable[[str], Path],
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = copy(kind)
    change(path, SCALES[kind], "scales", how)
    said = told(capsys, path, root)
    assert f"{NAME}: the codes are equal but the stored scales differ" in said
    assert words in said
    assert "dB SQNR" in said


FILES = {"gguf": "model.gguf", "onnx": "model.onnx", **dict.fromkeys(FOLDERS, "model.safetensors")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_named(
    kind: str, copy: Callable[[str], Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy(kind) / FILES[kind]
    whole = file.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        assert str(file) in told(capsys, file.parent, root)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_of_the_weights_is_named(
    kind: str, copy: Callable[[str], Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any bit of the codes of one tensor, and any of its scales."""
    chosen = np.random.default_rng(0)
    for part, names in (("codes", CODES), ("scales", SCALES)):
        for _ in range(3):
            path = copy(kind)

            def flip(x: np.ndarray) -> np.ndarray:
                raw = np.frombuffer(x.tobytes(), np.uint8).copy()
                raw[chosen.integers(len(raw))] ^= np.uint8(1 << int(chosen.integers(8)))
                return raw.view(x.dtype).reshape(x.shape)

            change(path, names[kind], part, flip)
            said = told(capsys, path, root)
            assert f"{NAME}: " in said
            shutil.rmtree(path)


@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer_is_named(
    kind: str, copy: Callable[[str], Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy(kind)
    if kind == "gguf":
        field = gguf.GGUFReader(path / "model.gguf", "r+").fields["tokenizer.ggml.tokens"]
        field.parts[field.data[300]][:1] = ord("Z")
        field.parts[field.data[300]].base.flush()
    else:
        text = (path / "tokenizer.json").read_text()
        spec = json.loads(text)
        spec["model"]["merges"][5:7] = spec["model"]["merges"][6:4:-1]
        (path / "tokenizer.json").write_text(json.dumps(spec))
    assert "tokenizer" in told(capsys, path, root)


@pytest.mark.parametrize("kind", ["gguf", "onnx", "hf", "mlx"])
def test_a_transposed_conv1d_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's square projection as codes, its fused one in floating point: as a writer that forgets to turn them."""
    files = tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, unk_token=END)
    model = prepare(tiny("gpt2"), [rule(INT4, ".*attn.c_proj")])
    model.config.architectures = ["GPT2LMHeadModel"]
    frozen = convert(model, tokenizer=files)
    frozen.save(tmp_path / "run" / "frozen")
    name = "transformer.h.1.attn.c_proj.weight"
    w = frozen.weights[name]
    wrong = replace(w, tensor=replace(w.tensor, codes=w.tensor.codes.t().contiguous()))
    export(replace(frozen, weights={**frozen.weights, name: wrong}), kind, tmp_path / "a")
    said = told(capsys, tmp_path / "a", tmp_path)
    assert f"{name}: the matrix is transposed" in said
    assert "dB SQNR" in said
