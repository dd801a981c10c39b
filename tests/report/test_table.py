"""The terminal table at several widths, and commands that a shell really runs."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sample
from rich.console import Console

from qat.report.rows import human_bytes
from qat.report.table import next_commands, result_table


def printed(report: Any, width: int, soft_wrap: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, soft_wrap=soft_wrap)
    console.print(result_table(report, console))
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str, label: str) -> list[str]:
    """The cells of the line that starts with a label, of all tables together."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [cell.strip() for line in lines if line.startswith(f"│ {label} ") for cell in line.split("│")[2:-1]]


def test_wide_table_has_every_arm_and_every_export() -> None:
    text = printed(sample.language_report(), 120)
    assert cells(text, "float") == ["3.2142", "24.883", "29.6 MB", "–", "–", "–", "–", "–"]
    assert cells(text, "control")[:2] == ["3.1921", "24.339"]
    assert cells(text, "PTQ")[:2] == ["3.2987", "27.077"]
    assert cells(text, "QAT")[:3] == ["3.2044", "24.641", "4.87 MB"]
    gguf = ["3.2044", "24.641", "4.91 MB", "5.27", "yes", "yes", "3.1e-04", "llama.cpp b6997 (xllamacpp)"]
    assert cells(text, "gguf") == gguf
    assert cells(text, "hf")[6:] == ["0", "transformers 5.23"]
    assert "QAT undid 85% of the damage of PTQ" in text
    assert "openai-community/gpt2 was NOT used" in text


@pytest.mark.parametrize("soft_wrap", [False, True])
@pytest.mark.parametrize("width", [60, 72, 80])
@pytest.mark.parametrize("kind", [sample.language_report, sample.classifier_report, sample.pretrain_report])
def test_narrow_table_fits_and_cuts_nothing(width: int, kind: Any, soft_wrap: bool) -> None:
    text = printed(kind(), width, soft_wrap)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for target in kind()["exports"]:
        assert cells(text, target)[4:6] == ["yes", "yes"]
    words = " ".join(text.replace("│", " ").split())
    for entry in kind().get("fallback", []):
        assert f"In its place: {entry['used']} ({entry['reason']})" in words


def test_accuracy_and_missing_runtime() -> None:
    report: Any = sample.classifier_report()
    for key in ("runtime", "loss", "accuracy", "max_logit_diff"):
        del report["exports"]["onnx"][key]
    report["exports"]["onnx"]["codes_equal"] = False
    text = printed(report, 120)
    assert "accuracy" in text
    assert cells(text, "float")[1] == "98.33%"
    assert cells(text, "onnx") == ["–", "–", "61.3 kB", "8.10", "NO", "yes", "–", "–"]


def test_markup_in_names_is_text() -> None:
    assert "[red]x[/red]" in printed(sample.language_report() | {"model": "[red]x[/red]"}, 120)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_996, "10.0 kB"), (99_960, "100 kB"), (999_600, "1.00 MB")),
        *((29_600_000, "29.6 MB"), (1_020_000_000, "1.02 GB"), (5e15, "5000 TB")),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_three_commands_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no llama-cli here
    run = sample.write_run(tmp_path / "a run", sample.language_report())
    monkeypatch.chdir(tmp_path)
    llama, hf, generate = next_commands(sample.language_report(), Path("a run"))
    assert f'p.model.path = "{run}/export/gguf/model.gguf"' in llama
    assert llama.startswith(f"{sys.executable} -c 'import xllamacpp")  # nor a `python`
    assert f'"{run}/export/hf"' in hf
    assert hf.startswith(f"{sys.executable} -c 'import qat; ")
    assert generate.startswith(str(Path(sys.executable).parent))
    assert generate.endswith(f"qat generate '{run}' --prompt The")


def test_llama_cli_is_preferred_and_plain_transformers_needs_no_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "llama-cli"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    run = sample.write_run(tmp_path / "run", sample.language_report())
    (run / "export/hf/config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    llama, hf, _ = next_commands(sample.language_report(), run)
    assert llama == f"llama-cli -m {run}/export/gguf/model.gguf -p The -n 40"
    assert "import qat" not in hf


def test_runs_without_exports_or_text_get_the_commands_that_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).with_name(name)))  # an active environment
    run = tmp_path
    hf, quantize = next_commands(sample.pretrain_report(), run)
    assert f'"{run}/model"' in hf
    assert quantize == f"qat train recipe=quickstart model.path={run}/model"
    assert [c.split()[0] for c in next_commands(sample.classifier_report(), run)] == ["python", "qat"]


def paste(command: str) -> str:
    """What a shell prints for the command, with this interpreter as `python`."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


NASTY = 'it\'s a "run" $HOME #1, ü=(x)'


def test_onnx_command_runs_on_a_nasty_path(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run = sample.write_run(tmp_path / NASTY, sample.classifier_report())
    float32 = onnx.TensorProto.FLOAT
    x, y = (onnx.helper.make_tensor_value_info(name, float32, [1, 64]) for name in ("pixels", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["pixels"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=opset), run / "export/onnx/model.onnx")
    assert "('pixels', 'tensor(float)', [1, 64])" in paste(next_commands(sample.classifier_report(), run)[0])
