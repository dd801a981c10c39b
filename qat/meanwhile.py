"""Threads that follow a folder whose files are being written, and have little left to do when the writers are done."""

import hashlib
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from qat.files import flush_files

PIECE = 2**18  # bytes of a file that are read at a time


@contextmanager
def flushed_meanwhile(folder: Path) -> Generator[None]:
    """Brings to the disk what is written so far, so that the last flush, which waits, is short.

    For folders of few large files: all of them are looked at four times a second.
    """
    with _repeated(lambda _: flush_files(folder), 0.25):
        yield


@contextmanager
def hashed_meanwhile(folder: Path) -> Generator[Callable[[Path], str]]:
    """Yields what gives the SHA-256 of a file of `folder` whose writer has closed it, most of it taken before.

    Every file of more than PIECE bytes must be written once, from the first byte to the last: what has been hashed is
    not looked at again, unless another file took its place, or it became shorter.
    """
    known: dict[Path, _Hash] = {}
    lock, buffer = threading.Lock(), memoryview(bytearray(PIECE))

    def hashed(file: Path, stopped: Callable[[], bool] = lambda: False) -> str:
        with lock:
            return _updated(file, known, buffer, stopped)

    def follow(stopped: Callable[[], bool]) -> None:
        for file in folder.rglob("*"):
            if file.is_file() and file.stat().st_size > PIECE:
                hashed(file, stopped)

    with _repeated(follow, 0.1):
        yield hashed


@contextmanager
def fewer_threads() -> Generator[None]:
    """Leaves two cores to writing and hashing: torch's threads, which wait for each other by spinning, take all."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Hash:
    """Of one file: SHA-256 of its first `size` bytes; number: by which the file system knows it."""

    def __init__(self, number: int) -> None:
        self.number, self.size, self.made = number, 0, hashlib.sha256()


def _updated(file: Path, known: dict[Path, _Hash], buffer: memoryview, stopped: Callable[[], bool]) -> str:
    """buffer: one for all files, since memory that comes and goes makes the threads wait for each other."""
    with file.open("rb", buffering=0) as f:
        found = os.fstat(f.fileno())
        so_far = known.get(file)
        if so_far is None or so_far.number != found.st_ino or found.st_size < so_far.size:
            so_far = known[file] = _Hash(found.st_ino)
        f.seek(so_far.size)
        while not stopped() and (length := f.readinto(buffer)):
            so_far.made.update(buffer[:length])
            so_far.size += length
    return so_far.made.hexdigest()


@contextmanager
def _repeated(work: Callable[[Callable[[], bool]], object], seconds: float) -> Generator[None]:
    """A thread does `work` again and again, so many seconds after the last time, until the block ends. work is given
    what says that it has ended."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(seconds):
            with suppress(OSError):  # a file that was renamed; what the disk refuses, the last flush says
                work(done.is_set)

    thread = threading.Thread(target=loop, daemon=True)
    try:
        thread.start()
        yield
    finally:  # an interrupt may come before `start` has returned
        done.set()
        if thread.ident is not None:
            thread.join()
