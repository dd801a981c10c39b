"""The lines of the result table as text, the same for the terminal and for report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat.report.schema import Report

ARMS = {"float": "float", "control": "control", "ptq": "PTQ", "qat": "QAT"}
"""Stage → its label, in the order of the table."""

BLANK = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluated model. `key` is the stage or the target; `figures` the entry of report.json it came from."""

    key: str
    label: str
    exported: bool
    figures: Mapping[str, Any]

    @property
    def loss(self) -> str:
        return number(self.figures, "loss", ".4f")

    @property
    def quality(self) -> str:
        """Perplexity, or accuracy in percent."""
        return quality(self.figures)

    @property
    def size(self) -> str:
        return human_bytes(self.figures["bytes"])

    @property
    def bits(self) -> str:
        return number(self.figures, "bits_per_weight", ".2f")

    @property
    def logit_diff(self) -> str:
        return "0" if self.figures.get("max_logit_diff") == 0 else number(self.figures, "max_logit_diff", ".1e")

    @property
    def runtime(self) -> str:
        return self.figures.get("runtime", BLANK)

    @property
    def verified(self) -> bool:
        """The file was read back and holds the codes, stored scales and weights that were decided."""
        return bool(self.exported and self.figures.get("codes_equal") and self.figures.get("weights_equal"))

    @property
    def unreadable(self) -> bool:
        """A compiled file, which is run but cannot be read back: neither verified nor failed."""
        return self.exported and "codes_equal" not in self.figures

    @property
    def caveats(self) -> Sequence[str]:
        """What the runtime computes otherwise than training did, and what could not be compared, a sentence each."""
        return self.figures.get("unchecked", [])

    def equal(self, what: str) -> str:
        """For `codes` or `weights`: yes, NO, or blank."""
        same = self.figures.get(f"{what}_equal")
        return BLANK if same is None else ("yes" if same else "NO")


def rows(report: Report) -> list[Row]:
    """Arms first, in the order of the run, then every written file."""
    stages: Mapping[str, Any] = report["stages"]
    arms = [Row(key=k, label=v, exported=False, figures=stages[k]) for k, v in ARMS.items() if k in stages]
    return arms + [Row(key=k, label=k, exported=True, figures=dict(v)) for k, v in report["exports"].items()]


def quality_name(report: Report) -> str:
    """Either "accuracy" or "perplexity": what the stages of this run were judged by."""
    return "accuracy" if any("accuracy" in row.figures for row in rows(report)) else "perplexity"


def quality(figures: Mapping[str, Any]) -> str:
    """Perplexity to five digits or more, accuracy in percent; blank if neither is there."""
    if "accuracy" in figures:
        return f"{figures['accuracy']:.2%}"
    if "perplexity" not in figures:
        return BLANK
    value = figures["perplexity"]
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def number(figures: Mapping[str, Any], key: str, form: str) -> str:
    """The figure in the given format, or a dash."""
    return format(figures[key], form) if key in figures else BLANK


def human_bytes(count: float) -> str:
    """Decimal units, three digits: 999 B, 21.9 MB, 1.02 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    digits = 0 if units[0] == "B" or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{digits}f} {units[0]}"
