"""How far a child process is: it writes "done total" into the file that QAT_PROGRESS names, and its parent looks there.

A file needs no pipe that could fill up and no output to be parsed, and it serves a child's child just as well.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
VARIABLE = "QAT_PROGRESS"
SECONDS = 0.2  # between two looks


def tell(done: int, total: int) -> None:
    """In the child: `done` steps of `total` are behind us. Nothing happens where nobody asked; never raises."""
    if path := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):  # a full disk must not end what would have worked without this line
            Path(path).write_text(f"{done} {total}")


def told(items: Sequence[Item]) -> Iterable[Item]:
    """The items, each of them told when it is done."""
    for done, item in enumerate(items):
        tell(done, len(items))
        yield item
    tell(len(items), len(items))


@contextlib.contextmanager
def follow(show: Callable[[int, int], None]) -> Generator[None]:
    """In the parent: call `show(done, total)`, in a thread, for whatever the children started in here tell.

    Where this process is itself being followed, its children tell its parent.
    """
    if VARIABLE in os.environ:
        yield
        return
    over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="qat-progress-") as folder:
        file = Path(folder, "progress")
        watcher = threading.Thread(target=_watch, args=(file, show, over), daemon=True)
        os.environ[VARIABLE] = str(file)
        watcher.start()
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            over.set()
            watcher.join()


def _watch(file: Path, show: Callable[[int, int], None], over: threading.Event) -> None:
    last, ended = "", False
    while not ended:
        ended = over.wait(SECONDS)  # one last look after the end
        with contextlib.suppress(OSError):  # not there yet
            said = file.read_text()
            if said != last and len(said.split()) == 2:  # else it is just being written
                last = said
                done, total = map(int, said.split())
                show(done, total)
