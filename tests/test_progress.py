"""A child's progress reaches its parent, through a process in between too, and costs nothing where nobody asks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qat import progress
from qat.progress import VARIABLE, follow, told
from qat.runtimes import environment

CHILD = """
import sys, time
from pathlib import Path
from qat.progress import told
for i in told(range(3)):
    while not Path(sys.argv[1], str(i)).exists(): time.sleep(0.01)  # until the parent has shown it
"""
BETWEEN = f"""
import subprocess, sys
from qat.progress import follow
def show(done, total): raise AssertionError("it is the outer parent's to show")
with follow(show): subprocess.run([sys.executable, "-c", {CHILD!r}, sys.argv[1]], check=True)
"""


@pytest.mark.parametrize("code", [CHILD, BETWEEN], ids=["child", "grandchild"])
def test_a_child_is_followed(code: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def show(done: int, total: int) -> None:
        seen.append((done, total))
        (tmp_path / str(done)).touch()

    with follow(show):
        subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(), check=True, timeout=600)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert VARIABLE not in os.environ


class Script:
    """The event that ends the watcher. Before each look the file gets the next text; None: it is left as it is."""

    def __init__(self, file: Path, texts: list[str | None]) -> None:
        self.file, self.texts = file, texts

    def wait(self, seconds: float) -> bool:
        text = self.texts.pop(0)
        if text is not None:
            self.file.write_text(text)
        return not self.texts


def test_a_torn_line_and_a_missing_folder_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    looks: Any = Script(tmp_path / "progress", [None, "1", "2 4", "2 4", "3"])
    progress._watch(tmp_path / "progress", lambda done, total: seen.append((done, total)), looks)
    assert seen == [(2, 4)]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone" / "progress"))
    assert list(told([5, 6])) == [5, 6]
