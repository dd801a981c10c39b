"""docs/parity.md: its columns, the bounds that a row may miss, and how the rows of a run replace the older ones."""

import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from machine import info, instructions
from torch import Tensor

from qat.files import atomic_file

COLUMNS = (
    *("target", "export", "model", "misses", "codes, weights", "logits: median", "within 2e-6", "spread"),
    *("perplexity", "in the runtime", "greedy", "runtime", "measured", "cause"),
)
START, END = "<!-- rows -->", "<!-- end of rows -->"
FILE = Path(__file__).parents[1] / "docs/parity.md"
FLOAT, SHARE, PERPLEXITY = 2e-6, 1 / 3, 5e-4
HALF = 6.4e-4  # gptqmodel multiplies code and scale in float16, docs/hugging_face.md
SHORT = {"Conv1D": "Linear only", "is not divisible by block": "shape", "this model's heads have": "head size"}


class Row(NamedTuple):
    """The cells of a line, the first three its key; and the whole reason for which it has no figures."""

    cells: list[str]
    reason: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.cells[:3])


def misses(
    *, equal: bool, error: Tensor, spread: float, rounded: bool, half: bool, ratio: float, text: bool = True
) -> str:
    """Which bounds a row misses. error: of the logits [prompts], in the largest; ratio: runtime's perplexity to ours;
    text: whether the greedy text is the runtime's, up to a step within the spread.

    rounded: activations are, so that one flipped code decorrelates all that follows; half: a float16 runtime.
    """
    if rounded:
        logits = float((error <= FLOAT).float().mean()) >= SHARE and float(error.median()) <= spread
    else:
        logits = float(error.max()) <= (HALF if half else FLOAT)
    met = {"codes": equal, "logits": logits, "perplexity": abs(ratio - 1) <= PERPLEXITY, "greedy": text}
    return ", ".join(f"**{name}**" for name, ok in met.items() if not ok) or "none"


def today() -> str:
    """The cell "measured": the day, and the processor's instruction set, with which kernels and roundings differ."""
    return f"{date.today()}, {instructions(info(), torch.backends.cpu.get_cpu_capability())}"


def without_figures(key: list[str], verb: str, reason: str) -> Row:
    """The row of what was refused, or not run; the table says why in a word or two, its notes at length."""
    reason = " ".join(reason.replace("`", "'").split())
    word = next((f": {short}" for sign, short in SHORT.items() if verb == "refused" and sign in reason), "")
    return Row([*key, "", verb + word, *[""] * 7, today(), ""], reason)


def line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(text: str) -> list[Row]:
    """The rows between the two marks. Raises ValueError if they are not there."""
    table, _, notes = text[text.index(START) : text.index(END)].partition("\n\n1. ")
    reasons = re.findall(r"\d+\. `(.*)`", f"1. {notes}")
    rows = []
    for found in table.splitlines():
        cells = [cell.strip() for cell in found.strip("|").split(" | ")]
        if found.startswith("| ") and cells[0] != COLUMNS[0]:
            note = re.search(r" \[(\d+)\]$", cells[4])
            cells[4] = cells[4].removesuffix(note[0] if note else "")
            rows.append(Row(cells, reasons[int(note[1]) - 1] if note else ""))
    return rows


def render(rows: list[Row]) -> str:
    """The table and, numbered, the reasons of the rows without figures."""
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    lines = [line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for cells, reason in rows:
        note = f" [{reasons.index(reason) + 1}]" if reason else ""
        lines.append(line([*cells[:4], cells[4] + note, *cells[5:]]))
    lines += ["", *(f"{i}. `{reason}`" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines).rstrip() + "\n"


def merged(text: str, rows: list[Row], order: list[tuple[str, ...]]) -> str:
    """`text` with these rows in place of older ones of the same key; of the others, those that `order` names stay."""
    new = {row.key: row for row in [*read(text), *rows]}
    head, foot = text[: text.index(START)], text[text.index(END) :]
    return f"{head}{START}\n{render([new[key] for key in order if key in new])}{foot}"


def write(rows: list[Row], order: list[tuple[str, ...]]) -> None:
    """Merge the rows into docs/parity.md."""
    text = merged(FILE.read_text(encoding="utf-8"), rows, order)
    with atomic_file(FILE) as temp:
        temp.write_text(text, encoding="utf-8")
