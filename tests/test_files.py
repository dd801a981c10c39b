"""Writes are whole or not at all, leave nothing behind on a full disk, and are refused early where they can't be."""

import errno
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.files import atomic_file, atomic_folder, atomic_write, refuse_unwritable

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


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.0123abcd.partial").write_text("half")
    (tmp_path / ".other.0123abcd.partial").write_text("half")
    atomic_write(tmp_path / "file", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"file", ".other.0123abcd.partial"}


def test_a_place_that_cannot_be_written_is_refused_and_one_that_can_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file", tmp_path / "file" / "a" / "b", Path("/proc/nothing/here")):
        with pytest.raises(UserError, match=f"--out={impossible} cannot be written"):
            refuse_unwritable("--out", impossible)
    refuse_unwritable("--out", tmp_path / "a" / "b")
    refuse_unwritable("--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
