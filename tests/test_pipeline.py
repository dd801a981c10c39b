"""Whole runs of the main recipes, shortened: run folder, report, exports proven in their runtimes, damage caught."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qat import cli, entry
from qat.exporters.gguf import FILE
from qat.frozen import Frozen

SHORT = ["trainer.max_steps=2", "evaluation.windows=3", "evaluation.every_n_steps=2", "data.batch_size=2"]
SHORT += ["trainer.limit_val_batches=2", "trainer.accelerator=cpu"]


def report_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "quick start, (1)"
    cache = tmp_path_factory.mktemp("cache")
    arguments = ["recipe=quickstart", f"run_dir={run_dir}", f"data.cache_dir={cache}", "data.block_size=64", *SHORT]
    assert entry.main(arguments) == 0
    return run_dir


def test_the_run_folder_holds_what_scripts_rely_on(quickstart: Path) -> None:
    for name in ("config.yaml", "report.json", "report.html", "metrics.csv", "frozen/manifest.json"):
        assert (quickstart / name).is_file(), name
    report = report_of(quickstart)
    assert report["recipe"] == "quickstart"
    assert set(report["stages"]) == {"float", "control", "ptq", "qat"}
    assert {row["reason"].split(" ")[0] for row in report["coverage"]} >= {"rule", "tied", "no"}
    assert report["stages"]["qat"]["bytes"] < 0.25 * report["stages"]["float"]["bytes"]
    assert len(report["layers"]) == 17


@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_every_export_is_equal_and_runs_as_trained(quickstart: Path, target: str) -> None:
    entry_ = report_of(quickstart)["exports"][target]
    assert entry_["codes_equal"] is True
    assert entry_["weights_equal"] is True
    told = "to 8 bits, and training left it in floating point" if target == "gguf" else "`import qat` first"
    assert any(told in line for line in entry_["unchecked"])
    trained = report_of(quickstart)["stages"]["qat"]["perplexity"]
    # llama.cpp rounds activations to 8 bits, torch does not: three short windows leave more than the 0.1% of many
    assert entry_["perplexity"] == pytest.approx(trained, rel=1e-2 if target == "gguf" else 1e-5)
    assert (quickstart / entry_["path"] / "README.md").read_text().count("int4 (1, 32) signed_max portable") == 1


def test_verify_and_inspect_from_the_command_line(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(quickstart / "export" / "hf"), "--no-runtime"]) == 0
    assert "codes and stored scales equal: True" in capsys.readouterr().out
    assert cli.main(["inspect", str(quickstart)]) == 0
    assert "bits a weight" in capsys.readouterr().out


def test_a_flipped_bit_is_exit_3_with_and_without_the_manifest(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((quickstart / "export" / "gguf" / FILE).read_bytes())
    data[-1000] ^= 1
    (tmp_path / FILE).write_bytes(data)
    assert cli.main(["verify", str(tmp_path / FILE), "--against", str(quickstart), "--no-runtime"]) == 3
    assert "transformer." in capsys.readouterr().err
    whole = tmp_path / "whole"
    shutil.copytree(quickstart / "export" / "gguf", whole)
    (whole / FILE).write_bytes(data)
    assert cli.main(["verify", str(whole)]) == 3
    assert "SHA-256" in capsys.readouterr().err


def test_an_export_from_the_frozen_codes_has_the_same_codes(quickstart: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(quickstart), "--to", "gguf", "--out", str(out), "--no-verify"]) == 0
    assert (out / "gguf" / FILE).read_bytes() == (quickstart / "export" / "gguf" / FILE).read_bytes()
    assert cli.main(["export", str(quickstart), "--to", "onnx", "--out", str(out)]) == 0  # and run there


def test_without_the_hub_gpt2_int4_runs_on_the_stand_ins_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    arguments = ["recipe=gpt2_int4", "control=false", "trainer.precision=32-true", "export=gguf", *SHORT]
    assert entry.main([*arguments, "trainer.max_steps=1"]) == 0
    run_dir = tmp_path / "outputs" / "gpt2_int4-OFFLINE-gpt2_mini" / "latest"
    report = report_of(run_dir)
    assert [f["used"] for f in report["fallback"]] == ["gpt2_mini", "stdlib"]
    assert "COULD NOT BE REACHED" in capsys.readouterr().out
    assert b"gpt2_int4-OFFLINE-gpt2_mini" in (run_dir / "export" / "gguf" / FILE).read_bytes()[:20000]
    assert "Stand-in" in (run_dir / "export" / "gguf" / "README.md").read_text()


def test_nothing_stands_in_for_a_path_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    run_dir = tmp_path / "run"
    assert entry.main(["recipe=gpt2_int4", "model.path=someone/else", f"run_dir={run_dir}"]) == 2
    assert "someone/else" in capsys.readouterr().err
    assert not run_dir.exists()


def test_digits_run_as_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert entry.main(["recipe=digits_cnn_int8", f"run_dir={run_dir}", "trainer.max_steps=20"]) == 0
    assert cli.main(["export", str(run_dir), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out" / "gguf").exists()
    onnx = report_of(run_dir)["exports"]["onnx"]
    assert onnx["codes_equal"]
    assert onnx["predictions_equal"] >= 0.999
    frozen = Frozen.load(run_dir / "frozen")
    assert all(i.static for i in frozen.inputs.values())

    capsys.readouterr()
    trained = report_of(run_dir)["stages"]["qat"]
    for path, figures in ((run_dir, trained), (run_dir / "frozen", trained), (run_dir / "export" / "onnx", onnx)):
        assert cli.main(["eval", str(path)]) == 0
        said = capsys.readouterr().out
        assert "359 images" in said
        assert f"loss {figures['loss']:.6f} nats an image, accuracy {figures['accuracy']:.4f}" in said
    alone = shutil.copytree(run_dir / "export" / "onnx", tmp_path / "alone")
    for arguments, message in (
        (["eval", str(alone)], "scored on the evaluation.safetensors of its run"),
        (["eval", str(run_dir), "--data", "text.txt"], "--data is text"),
        (["generate", str(run_dir), "--prompt", "a"], "is a classifier, which generates no text"),
        (["generate", str(alone), "--prompt", "a"], "is a classifier, which generates no text"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    kept = run_dir / "evaluation.safetensors"
    kept.write_bytes(kept.read_bytes()[:-100])
    for arguments in (["eval", str(run_dir)], ["verify", str(run_dir / "export" / "onnx")]):
        assert cli.main(arguments) == 3
        assert capsys.readouterr().err.startswith(f"error: {kept} cannot be read: ")


def test_a_missing_runtime_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qat.exporters.gguf.find_spec", lambda name: None)
    monkeypatch.setattr("qat.exporters.gguf.which", lambda name: None)
    run_dir = tmp_path / "run"
    assert entry.main(["recipe=quickstart", f"run_dir={run_dir}"]) == 2
    assert "pip install xllamacpp" in capsys.readouterr().err
    assert not run_dir.exists()
