"""How a run shows its stages: a bar with the time left while one works, a line of outcome and its time after it."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass
class Outcome:
    """text: what the finished stage says, in one line. track(items): the items, the bar advancing with each."""

    track: Callable[[Sequence[Any]], Iterable[Any]]
    text: str = "done"


class Stages:
    """`with stages("float") as outcome:` times a stage and prints its outcome; `timing` has seconds by name."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.timing: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Generator[Outcome]:
        """The bar pulses until something is tracked. Nothing is printed for a stage that fails: the error speaks."""
        start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def track(items: Sequence[Any]) -> Iterable[Any]:
                bar.reset(task, total=len(items))
                for item in items:
                    yield item
                    bar.advance(task)

            outcome = Outcome(track)
            yield outcome
        self.timing[f"{name.replace(' ', '_')}_seconds"] = seconds = time.perf_counter() - start
        self.console.print(f"[bold]{name:>11}[/]  {outcome.text}  [dim]{seconds:.1f} s[/]")
