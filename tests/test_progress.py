"""A child's progress reaches its parent, through a process in between too, and costs nothing where nobody asks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qat.progress import VARIABLE, follow, tell, told
from qat.runtimes import environment

CHILD = "import time; from qat.progress import told\nfor i in told(range(3)): time.sleep(0.5)"
BETWEEN = f"""
import subprocess, sys
from qat.progress import follow
def show(done, total): raise AssertionError("it is the outer parent's to show")
with follow(show): subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


@pytest.mark.parametrize("code", [CHILD, BETWEEN], ids=["child", "grandchild"])
def test_a_child_is_followed(code: str) -> None:
    seen: list[tuple[int, int]] = []
    with follow(lambda done, total: seen.append((done, total))):
        subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    assert seen == sorted(seen)
    assert {(1, 3), (3, 3)} <= set(seen)
    assert VARIABLE not in os.environ


def test_a_torn_line_and_a_missing_folder_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    with follow(lambda done, total: seen.append((done, total))):
        Path(os.environ[VARIABLE]).write_text("1")
        time.sleep(0.5)
        tell(2, 4)
        time.sleep(0.5)
    assert seen == [(2, 4)]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone" / "progress"))
    assert list(told([5, 6])) == [5, 6]
