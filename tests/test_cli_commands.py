"""What the commands of an export refuse: text longer than the model, counts out of range, damaged folders."""

import os
import shutil
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from qat import cli
from qat.conversion import convert, prepare
from qat.exporters import export
from qat.frozen import Frozen
from qat.models.load import EMBEDDED
from qat.scheme import QuantSpec, Rule, Scheme

FILES = {name: (EMBEDDED["gpt2_mini"] / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
RULE = Rule(type="Conv1D", scheme=Scheme(weight=QuantSpec(qtype="int4", block=(1, 32))))


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    return convert(prepare(model, [RULE]), tokenizer=FILES)


@pytest.fixture(scope="module")
def folder(frozen: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(frozen, "hf", tmp_path_factory.mktemp("e") / "hf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "import os " * 40], "more than the 32 positions"),
        (["generate", "--prompt", ""], "--prompt is empty"),
        (["generate", "--prompt", "import os", "--tokens", "32"], "more than the 32 positions"),
        (["eval", "--block-size", "33", "--windows", "1"], "more than the 32 positions"),
        (["eval", "--windows", "0"], "--windows=0"),
        (["export", "--to", ",", "--out", "out"], "names no target"),
        (["export", "--to", "hf", "--out", f"{__file__}/out"], "--out="),
        (["verify", "--json", f"{__file__}/verdict.json"], "--json="),
        (["verify", "--json", "."], "--json=. is a folder"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main([arguments[0], str(folder), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_its_vocabulary_or_cut_short(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        if file.name not in ("tokenizer.json", "manifest.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    generate = ["generate", str(tmp_path), "--prompt", "import", "--tokens", "2"]
    assert cli.main(generate) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert cli.main(generate) == 0
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(generate) == 3
    assert "model.safetensors cannot be read" in capsys.readouterr().err


def test_a_language_model_that_lost_its_tokenizer_is_told_so(
    frozen: Frozen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen.save(tmp_path / "frozen")
    shutil.rmtree(tmp_path / "frozen" / "tokenizer")
    for command in (["eval", str(tmp_path)], ["generate", str(tmp_path), "--prompt", "import"]):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.startswith(f"error: there is no tokenizer beside {tmp_path}; ")
    (tmp_path / "frozen" / "frozen.json").write_text("{")
    assert cli.main(["eval", str(tmp_path)]) == 3
    assert "frozen.json cannot be read" in capsys.readouterr().err


def test_paths_that_no_command_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder.gguf").mkdir()
    paths = ("/dev/null", tmp_path / "fifo.gguf", tmp_path / "loop", tmp_path / "folder.gguf", tmp_path / ("x" * 300))
    for path in paths:
        for command in (["verify", str(path)], ["export", str(path), "--to", "hf", "--out", str(tmp_path / "out")]):
            assert cli.main(command) == 2, command
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert "cannot write" not in said
    assert cli.main(["export", str(tmp_path), "--to", "hf", "--out", str(tmp_path / ("y" * 300))]) == 2
    assert not (tmp_path / "out").exists()
