"""What the commands of an export refuse: text longer than the model, counts out of range, damaged folders."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from qat import cli, shipping
from qat.conversion import convert, prepare
from qat.errors import VerifyError
from qat.exporters import export, hf
from qat.frozen import Frozen
from qat.models.load import EMBEDDED
from qat.scheme import QuantSpec, Rule, Scheme
from qat.stages import Stages
from qat.verification import verify

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
        (["export", "--to", "gptq_layout", "--out", "out"], "there is no export target 'gptq_layout'"),
        (["export", "--to", "hf", "--out", f"{__file__}/out"], "--out="),
        (["verify", "--json", f"{__file__}/verdict.json"], "--json="),
        (["verify", "--json", "."], "--json=. is a folder"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main([arguments[0], str(folder), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


def test_an_export_deletes_nothing_that_qat_did_not_write(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(folder), "--to", "hf", "--out", str(tmp_path), "--no-verify"]
    assert cli.main(command) == 0
    assert cli.main(command) == 0  # over our own
    (tmp_path / "hf" / "precious.txt").write_text("mine")
    assert cli.main(command) == 2
    assert "holds precious.txt, which qat did not write there" in capsys.readouterr().err
    assert (tmp_path / "hf" / "precious.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "hf").write_text("mine")
    assert cli.main(command) == 2
    assert (tmp_path / "hf").read_text() == "mine"
    with pytest.raises(SystemExit) as error:
        cli.main([*command[:4], "--out", ""])
    assert error.value.code == 2


def test_an_export_that_fails_verification_is_set_aside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = hf.packed_tensors

    def damaged(frozen: Frozen, plain: bool) -> Any:
        for name, make in whole(frozen, plain):
            yield name, (lambda make=make: make() + 1) if name.endswith("c_fc.weight") else make

    monkeypatch.setattr(hf, "packed_tensors", damaged)
    for name in ("hf.failed", "hf.failed1"):
        assert cli.main(["export", str(folder), "--to", "hf", "--out", str(tmp_path)]) == 3
        said = capsys.readouterr().err
        assert "c_fc.weight" in said
        assert f"what was written is kept as {tmp_path / name}" in said
        assert (tmp_path / name / "model.safetensors").is_file()
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("raised", [False, True])
def test_so_is_that_of_a_run(raised: bool, frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(path: Path, run_dir: Path) -> dict[str, Any]:
        if raised:
            raise VerifyError("unreadable")
        return {"figures": {}, "differences": ["a code differs"], "unchecked": ["its cache"]}

    monkeypatch.setattr(shipping, "verify_apart", found)
    facts: Any = {"title": "t", "data": "d", "stages": {}, "fallback": []}
    exports, (wrong,) = shipping.ship(frozen, ["hf"], tmp_path, Stages(Console(quiet=True)), **facts)
    assert "what was written is kept as" in str(wrong)
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["hf.failed"]
    assert exports == ({} if raised else {"hf": {"path": "export/hf.failed", "unchecked": ["its cache"]}})


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


def test_a_runs_weights_move_to_an_equal_grid_as_another_tools_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GGUF has no int4 in groups of 64; groups of 32 that repeat the scale are the same numbers."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=64, n_layer=1, n_head=2, n_positions=32))
    rule = Rule(type="Conv1D", scheme=Scheme(weight=QuantSpec(qtype="int4", block=(1, 64))))
    convert(prepare(model, [rule]), tokenizer=FILES).save(tmp_path / "frozen")
    assert cli.main(["export", str(tmp_path), "--to", "gguf", "--no-verify"]) == 0
    assert "4 weights of int4 (1, 64) absmax portable as int4 (1, 32)" in capsys.readouterr().out
    verdict = verify(tmp_path / "export" / "gguf", runtime=False)
    assert verdict.figures["weights_equal"]
    assert not verdict.differences
