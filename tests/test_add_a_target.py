"""docs/add_a_target.md as a newcomer follows it: its files put in place, its commands run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/add_a_target.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_worked_example(tmp_path: Path) -> None:
    for name in ("qat", "configs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", PAGE, re.DOTALL)
    assert [name for name, _ in files][:2] == ["qat/exporters/npz.py", "qat/runtimes/numpy_npz.py"]
    for name, text in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    (commands,) = re.findall(r"<!-- commands -->\n```\n(.*?)```\n", PAGE, re.DOTALL)
    for command in commands.splitlines():
        words = command.replace("qat verify", "python -m qat verify").split()
        short = ["model.epochs=2", "trainer.max_steps=20"] if "train.py" in command else []
        done = subprocess.run(
            [sys.executable, *words[1:], *short],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads((tmp_path / "outputs/npz/report.json").read_text())["exports"].values()
    assert found["codes_equal"]
    assert found["weights_equal"]
    assert found["predictions_equal"] == 1.0
    assert found["runtime"].startswith("numpy ")
