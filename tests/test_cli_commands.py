"""What the commands of an export refuse: text longer than the model, counts out of range, damaged folders."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from qat import cli
from qat.conversion import convert, prepare
from qat.exporters import export
from qat.models.load import ASSETS
from qat.scheme import QuantSpec, Rule, Scheme

RULE = Rule(type="Conv1D", scheme=Scheme(weight=QuantSpec(qtype="int4", block=(1, 32))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    files = {name: (ASSETS / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    return export(convert(prepare(model, [RULE]), tokenizer=files), "hf", tmp_path_factory.mktemp("e") / "hf")


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
