"""What follows a folder's writers: no thread is left, and every SHA-256 is that of the finished file."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from qat.meanwhile import PIECE, flushed_meanwhile, hashed_meanwhile


@pytest.mark.parametrize("follow", [flushed_meanwhile, hashed_meanwhile])
def test_an_interrupt_at_the_start_leaves_no_thread(
    follow: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def interrupted(self: threading.Thread) -> None:
        start(self)
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), follow(tmp_path):  # pyright: ignore[reportGeneralTypeIssues]
        pass
    assert [t.is_alive() for t in started] == [False]


def test_files_that_grow_are_replaced_cut_or_come_late(tmp_path: Path) -> None:
    pieces = [os.urandom(n) for n in (1, PIECE - 1, PIECE, 3 * PIECE + 7, 0, 12)]
    with hashed_meanwhile(tmp_path) as hashed:
        with (tmp_path / "grows").open("wb", buffering=0) as f:
            for piece in pieces:
                f.write(piece)
                time.sleep(0.15)  # the thread looks every tenth of a second
        for name in ("replaced", "cut"):
            (tmp_path / name).write_bytes(pieces[3])
        time.sleep(0.3)
        assert hashed(tmp_path / "replaced") == hashlib.sha256(pieces[3]).hexdigest()
        (tmp_path / "other").write_bytes(pieces[3] + b"another")
        (tmp_path / "other").replace(tmp_path / "replaced")
        (tmp_path / "cut").write_bytes(b"short")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "late").write_bytes(pieces[2])
        files = [f for f in tmp_path.rglob("*") if f.is_file()]
        assert len(files) == 4
        for file in files:
            assert hashed(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(FileNotFoundError), hashed_meanwhile(tmp_path) as hashed:
        hashed(tmp_path / "missing")


def test_the_thread_does_most_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(os.urandom(5 * PIECE))
    with hashed_meanwhile(tmp_path) as hashed:
        found = hashed(tmp_path / "f")
        made = hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()
        with (tmp_path / "f").open("r+b") as f:  # what it has seen it does not read again
            f.write(b"x")
        assert hashed(tmp_path / "f") == found == made
