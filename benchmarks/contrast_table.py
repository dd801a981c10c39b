"""docs/contrast.md: what was recorded of each seed and arm, and the paired differences that can be told from noise."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.files import atomic_file

FILE = Path(__file__).parents[1] / "docs/contrast.md"
HEAD = (
    "| runtime | trained on | seeds | in torch | in the runtime | nats above the first | ± seeds | ± windows | |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
# Student's t, two-sided 95%, of 1 to 9 degrees of freedom; above that 2.23 is never too small
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# settings; said (command and machine); seed; runtime; arm; torch (nats); nll (nats of each window in the runtime)
Record = dict[str, Any]


def read(file: Path) -> list[Record]:
    """The lines of a record. Raises UserError if there are none, or some that do not say how they were measured."""
    if not file.is_file():
        raise UserError(f"{file} does not exist: nothing was scored; give --seeds 1 or more, or another --record")
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if any("said" not in r for r in records):
        raise UserError(f"{file} is of an earlier program, which kept no commands; give another --record")
    return records


def interval(values: Tensor) -> tuple[float, float]:
    """Standard error of the mean of `values` [n], and half of its 95% interval; nan with fewer than two."""
    n = len(values)
    error = float(values.double().std() / math.sqrt(n)) if n > 1 else math.nan
    return error, error * (T95[n - 2] if 2 <= n <= len(T95) + 1 else 2.23)


def verdict(mean: float, *halves: float) -> str:
    """What a mean difference says when it must lie outside each 95% interval around zero."""
    if any(math.isnan(half) for half in halves):
        return "one seed: unknown"
    return "not distinguishable" if any(abs(mean) <= half for half in halves) else "worse" if mean > 0 else "better"


def row(records: list[Record], runtime: str, arm: str, first: str) -> str:
    """The line of one arm: perplexities of its mean loss over seeds, and its difference from the arm `first` on the
    same seeds and windows."""
    runs = {r["seed"]: r for r in records if (r["runtime"], r["arm"]) == (runtime, arm)}
    base = {r["seed"]: r for r in records if (r["runtime"], r["arm"]) == (runtime, first)}
    trained = math.exp(sum(r["torch"] for r in runs.values()) / len(runs))
    nll = torch.tensor([r["nll"] for r in runs.values()], dtype=torch.float64)
    cells = [runtime, arm, str(len(runs)), f"{trained:.2f}", f"{math.exp(float(nll.mean())):.2f}"]
    pairs = sorted(runs.keys() & base.keys())
    if arm == first or not pairs:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    found = [torch.tensor([r[s]["nll"] for s in pairs], dtype=torch.float64) for r in (runs, base)]
    difference = found[0] - found[1]  # [seeds, windows]
    mean = float(difference.mean())
    seeds, half = interval(difference.mean(1))
    windows, other = interval(difference.mean(0))
    cells += [f"{mean:+.4f}", f"{seeds:.4f}", f"{windows:.4f}", verdict(mean, half, other)]
    return "| " + " | ".join(cells) + " |"


def table(records: list[Record]) -> str:
    """The arms of one kind of run, a runtime's together; the arm that was recorded first is what the others are
    measured by."""
    first: dict[str, str] = {}
    for r in records:
        first.setdefault(r["runtime"], r["arm"])
    arms = sorted(dict.fromkeys((r["runtime"], r["arm"]) for r in records), key=lambda pair: list(first).index(pair[0]))
    return "\n".join([HEAD, *(row(records, runtime, arm, first[runtime]) for runtime, arm in arms)])


def tables(records: list[Record]) -> str:
    """A table for each kind of run, which are never compared with each other, under the commands that measured it."""
    found = []
    for kind in dict.fromkeys(r["settings"] for r in records):
        ours = [r for r in records if r["settings"] == kind]
        said = "\n".join(f"- {command}" for command in dict.fromkeys(r["said"] for r in ours))
        found.append(f"{kind}:\n{said}\n\n{table(ours)}")
    return "\n\n".join(found)


def write(about: str, records: list[Record]) -> None:
    """docs/contrast.md anew: `about` and the tables."""
    with atomic_file(FILE) as temp:
        temp.write_text(f"# What the right grid is worth\n{about}\n\n{tables(records)}\n", encoding="utf-8")
