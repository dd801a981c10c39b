"""Writes are whole or not at all, leave nothing behind on a full disk, and are refused early where they can't be."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.files import (
    HOST,
    atomic_file,
    atomic_folder,
    atomic_write,
    refuse_foreign,
    refuse_unwritable,
    write_manifest,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_target_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    folder = tmp_path / "folder"

    def half_a_file() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise FULL

    def half_a_folder() -> None:
        with atomic_folder(folder) as temporary:
            (temporary / "part").write_text("half")
            raise FULL

    with pytest.raises(UserError, match=f"cannot write {path}: No space left"):
        half_a_file()
    with pytest.raises(UserError, match=f"cannot write {folder}: No space left"):
        half_a_folder()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


KILLED = """
import os, sys
from pathlib import Path
from qat.files import atomic_file, atomic_folder
with atomic_folder(Path(sys.argv[1])), atomic_file(Path(sys.argv[2])) as file:
    file.touch()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder, file = tmp_path / "a folder [1]", tmp_path / "a file.b"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(file)], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    atomic_write(tmp_path / "a file", "has another name")
    with atomic_folder(folder):
        pass
    assert len(list(tmp_path.iterdir())) == 3
    atomic_write(file, "new")
    assert {p.name for p in tmp_path.iterdir()} == {"a file", file.name, folder.name}


def test_what_others_are_writing_stays(tmp_path: Path) -> None:
    alive = [f".name.{HOST}.{process}.0123abcd.partial" for process in (os.getpid(), os.getppid(), 1)]
    elsewhere = [f".name.{'0' * 8}.{2**22 + 1}.0123abcd.partial"]  # no process here has such a number
    for left in alive + elsewhere:
        (tmp_path / left).touch()
    atomic_write(tmp_path / "name", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"name", *alive, *elsewhere}


def test_the_first_of_two_writers_of_the_same_folder_wins_and_neither_fails(tmp_path: Path) -> None:
    path = tmp_path / "cached"
    with atomic_folder(path, shared=True) as slow:
        (slow / "part").write_text("slow")
        with atomic_folder(path, shared=True) as fast:
            (fast / "part").write_text("fast")
    assert (path / "part").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["cached"]


def test_a_place_that_cannot_be_written_is_refused_and_one_that_can_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file", tmp_path / "file" / "a" / "b", Path("/proc/nothing/here")):
        with pytest.raises(UserError, match=f"--out={impossible} cannot be written"):
            refuse_unwritable("--out", impossible)
    refuse_unwritable("--out", tmp_path / "a" / "b")
    refuse_unwritable("--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_was_being_replaced_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    """Killed between its two renames: the old folder has a hidden name. Killed after them: it is rubbish."""
    old = tmp_path / f".gguf.{HOST}.{2**22 + 1}.0123abcd.old"  # no process here has such a number
    old.mkdir()
    (old / "model").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "gguf"):
        _ = 1 // 0
    assert (tmp_path / "gguf" / "model").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["gguf"]
    old.mkdir()
    with atomic_folder(tmp_path / "gguf") as new:
        (new / "other").touch()
    assert [p.name for p in tmp_path.iterdir()] == ["gguf"]
    assert [p.name for p in (tmp_path / "gguf").iterdir()] == ["other"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "part").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "part").is_file()


def test_only_what_qat_wrote_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    refuse_foreign(path)
    path.mkdir()
    refuse_foreign(path)
    (path / "config.json").touch()
    with pytest.raises(UserError, match=r"hf holds config\.json, which qat did not write"):
        refuse_foreign(path)
    write_manifest(path, {})
    refuse_foreign(path)
    (path / "folder").mkdir()
    (path / "folder" / "precious.txt").touch()
    with pytest.raises(UserError, match=r"hf holds folder/precious\.txt"):
        refuse_foreign(path)
    with pytest.raises(UserError, match=r"config\.json is a file"):
        refuse_foreign(path / "config.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop is a link that leads to itself"):
        refuse_foreign(tmp_path / "loop")


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupt_while_a_folder_is_replaced_leaves_one_that_is_whole(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    made: list[Path] = []
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        made.append(rename(self, target))
        if len(made) == renames:
            raise KeyboardInterrupt
        return made[-1]

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "a").read_text() == ("old" if renames == 1 else "new")


@pytest.mark.parametrize("there", [True, False])
def test_another_process_that_writes_the_folder_in_the_same_moment(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = (tmp_path / "out").resolve(), Path.rename

    def written(content: str) -> None:
        path.mkdir()
        (path / "file").write_text(content)

    def late(self: Path, target: Path) -> Path:
        if target == path and not path.exists():
            written("theirs")  # between our looking and our renaming
        return rename(self, target)

    def write() -> None:
        with atomic_folder(path) as folder:
            (folder / "file").write_text("ours")

    if there:
        written("old")
    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(UserError, match="by another process in the same moment"):
        write()
    assert (path / "file").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
