"""How a run shows its stages: a bar with the time left while one works, a line of outcome and its time after it."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qat.progress import follow


@dataclass
class Outcome:
    """text: what the finished stage says, in one line. track(items): the items, the bar advancing with each.

    follow(): a context in which the bar shows how far the processes started in it are.
    """

    track: Callable[[Sequence[Any]], Iterable[Any]]
    follow: Callable[[], AbstractContextManager[None]]
    text: str = "done"


@contextmanager
def bar(name: str, console: Console) -> Generator[Outcome]:
    """A bar that pulses until something is tracked or followed; gone at the end, and absent without a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as drawn:
        task = drawn.add_task(name, total=None)

        def track(items: Sequence[Any]) -> Iterable[Any]:
            drawn.reset(task, total=len(items))
            for item in items:
                yield item
                drawn.advance(task)

        def show(done: int, total: int) -> None:
            drawn.update(task, completed=done, total=total)

        yield Outcome(track, partial(follow, show))


class Stages:
    """`with stages("float") as outcome:` times a stage and prints its outcome; `timing` has seconds by name."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.timing: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[Outcome]:
        """Nothing is printed for a stage that fails: the error speaks."""
        start = time.perf_counter()
        with bar(name, self.console) as outcome:
            yield outcome
        self.timing[f"{name.replace(' ', '_')}_seconds"] = seconds = time.perf_counter() - start
        self.console.print(f"[bold]{name:>11}[/]  {outcome.text}  [dim]{seconds:.1f} s[/]")
