"""How a run shows its stages: a spinner while one works, a line of outcome and its time after it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console


@dataclass
class Outcome:
    """What the finished stage says, in one line."""

    text: str = "done"


class Stages:
    """`with stages("float") as outcome:` times a stage and prints its outcome; `timing` has seconds by name."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.timing: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Outcome]:
        """Nothing is printed for a stage that fails: the error speaks for it."""
        outcome, start = Outcome(), time.perf_counter()
        with self.console.status(f"{name} …"):
            yield outcome
        self.timing[f"{name}_seconds"] = seconds = time.perf_counter() - start
        self.console.print(f"[bold]{name:>10}[/]  {outcome.text}  [dim]{seconds:.1f} s[/]")
