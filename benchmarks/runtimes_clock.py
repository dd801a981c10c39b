"""Times artefacts against each other: each in a process of its own, in rounds that alternate between them."""

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from qat.errors import UserError
from qat.runtimes import environment
from qat.runtimes.environments import interpreter
from qat.runtimes.transformers_folder import HELPERS, method

WORKER = Path(__file__).with_name("runtimes_worker.py")


class Lengths(NamedTuple):
    """Threads, tokens of the prompt, tokens after it."""

    threads: int
    prompt: int
    new: int


def python_of(runtime: str, path: Path) -> str:
    """The interpreter that runs this artefact. Raises UserError if its environment is missing."""
    return interpreter(HELPERS.get(method(path) or "", "") if runtime == "transformers_folder" else runtime)


class Clock:
    """A loaded artefact, waiting for its next round. load: seconds that loading took.

    Raises UserError if the runtime is not installed or cannot run it: the last line that it said.
    """

    def __init__(self, runtime: str, python: str, path: Path, lengths: Lengths) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        # gptqmodel compiles its kernels on the first token, for minutes; eager they compute the same
        threads = {f"{kind}_NUM_THREADS": str(lengths.threads) for kind in ("OMP", "MKL", "OPENBLAS")}
        options = [f"--{name}={value}" for name, value in lengths._asdict().items()]
        self.child = subprocess.Popen(
            [python, str(WORKER), runtime, str(path), *options],
            env={**environment(), **threads, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.load: float = self._answer()["load"]

    def _answer(self) -> dict[str, float]:
        assert self.child.stdout is not None
        if said := self.child.stdout.readline():
            return json.loads(said)
        self.child.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        raise UserError(lines[-1] if lines else f"it ended with code {self.child.returncode}")

    def round(self) -> tuple[float, float]:
        """Seconds of the prompt, and of each token after it."""
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):  # `_answer` says why
            print(file=self.child.stdin, flush=True)
        found = self._answer()
        return found["prompt"], found["new"]

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        self.log.close()


def race(clocks: dict[str, Clock], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """`rounds` of each, one after the other, every second time backwards: what slows the machine down slows all."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in clocks}
    for i in range(rounds):
        for name in list(clocks) if i % 2 == 0 else reversed(clocks):
            found[name].append(clocks[name].round())
    return found
