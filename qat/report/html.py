"""report.html: a run folder's report.json, metrics.csv and config.yaml as one page that loads nothing from anywhere."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from qat.files import atomic_write
from qat.report.charts import LineChart, layer_chart, line_chart
from qat.report.metrics import Curves, read_metrics
from qat.report.rows import Row, human_bytes, quality, quality_name, rows
from qat.report.schema import LEFT, Coverage, Report, read_report
from qat.report.table import next_commands


@dataclass(frozen=True, kw_only=True)
class Size:
    """One bar of the size chart: bytes as text, widths in percent of the largest; `quantized` is None if unknown."""

    label: str
    text: str
    detail: str
    width: float
    quantized: float | None
    exported: bool


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many parameters and elements are held in one scheme (`left`: in none, kept in float)."""

    scheme: str
    tensors: int
    elements: int
    percent: float
    left: bool


def write_html(run_dir: Path) -> Path:
    """Write `run_dir/report.html` atomically and return its path. A missing metrics.csv or config.yaml is said on the
    page; a missing or broken report.json is a UserError."""
    path = run_dir / "report.html"
    atomic_write(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page as text."""
    report = read_report(run_dir)
    config = _read(run_dir / "config.yaml")
    curves = read_metrics(run_dir / "metrics.csv") if (run_dir / "metrics.csv").is_file() else None
    files = resources.files("qat.report")
    environment = Environment(
        loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    lines = rows(report)
    exported = [row for row in lines if row.exported]
    return environment.from_string((files / "template.html").read_text(encoding="utf-8")).render(
        style=Markup((files / "style.css").read_text(encoding="utf-8")),
        script=Markup((files / "script.js").read_text(encoding="utf-8")),
        report=report,
        run_name=run_dir.absolute().name,
        rows=lines,
        exported=exported,
        failed=[row.label for row in exported if not (row.verified or row.unreadable)],
        unreadable=[row.label for row in exported if row.unreadable],
        quality_name=quality_name(report),
        quality=quality,
        change=_change,
        human_bytes=human_bytes,
        stages=report["stages"],
        after=_after(lines),
        curves=_charts(curves or {}, config),
        no_curves=_why_no_curves(report, curves),
        layers=layer_chart(layers) if (layers := report.get("layers")) else None,
        sizes=_sizes(lines),
        shares=_shares(report["coverage"]),
        commands=next_commands(report, run_dir),
        config=config,
        facts=_facts(report),
        left=LEFT,
    )


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _after(lines: Sequence[Row]) -> Row | None:
    """What the run produced: the smallest sound export that ran, else the last arm, if there is one."""
    ran = [row for row in lines if (row.verified or row.unreadable) and "loss" in row.figures]
    if ran:
        return min(ran, key=lambda row: row.figures["bytes"])
    arms = {row.key: row for row in lines}
    return arms.get("qat") or arms.get("ptq") or arms.get("control")


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """From float to `after`: perplexity in percent of itself, accuracy in percentage points."""
    if "accuracy" in before:
        text = f"{100 * (after['accuracy'] - before['accuracy']):+.2f}"
        return f"{_signed(text)} points from float"
    text = f"{100 * (after['perplexity'] / before['perplexity'] - 1):+.2f}"
    return f"{_signed(text)}% from float"


def _signed(text: str) -> str:
    """A signed number with a true minus, and no sign on zero."""
    return text.replace("-", "−") if float(text) else text[1:]


def _charts(curves: Curves, config: str | None) -> list[LineChart]:
    """One chart for every loss and accuracy in metrics.csv, arms in a fixed order."""
    start = re.search(r"^quant_start_step:\s*(\d+)\s*$", config or "", re.MULTILINE)
    order = ["float", "control", "qat"]
    charts: list[LineChart] = []
    for name, arms in curves.items():
        if "loss" in name.lower() or "accuracy" in name.lower():
            sorted_arms = sorted(arms.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1)
            charts.append(line_chart(name, dict(sorted_arms), int(start[1]) if start else None))
    return charts


def _why_no_curves(report: Report, curves: Curves | None) -> str:
    if curves is None and not {"qat", "control"} & report["stages"].keys():
        return "This run did not train, so there are no curves."
    return "metrics.csv is missing from the run folder." if curves is None else "metrics.csv holds no loss."


def _sizes(lines: Sequence[Row]) -> list[Size]:
    """The float model and every export; without exports, what the arms would take."""
    exported = [row for row in lines if row.exported]
    shown = [row for row in lines if row.key == "float" and not row.exported]
    shown += exported or [row for row in lines if row.key in ("ptq", "qat")]
    top = max((row.figures["bytes"] for row in shown), default=1)
    sizes: list[Size] = []
    for row in shown:
        total, quantized = row.figures["bytes"], row.figures.get("bytes_quantized")
        sizes.append(
            Size(
                label="float32" if row.key == "float" and not row.exported else row.label,
                text=row.size,
                detail="" if quantized is None else _split(quantized, total - quantized),
                width=100 * total / top,
                quantized=None if quantized is None else 100 * quantized / top,
                exported=row.key != "float" or row.exported,
            )
        )
    return sizes


def _split(quantized: int, other: int) -> str:
    return f"{human_bytes(quantized)} quantized, {human_bytes(other)} other"


def _shares(coverage: Sequence[Coverage]) -> list[Share]:
    """Schemes by the elements they hold, those left in float last."""
    groups: dict[str, list[int]] = {}
    for entry in coverage:
        groups.setdefault(entry["scheme"], []).append(math.prod(entry["shape"]))
    total = max(sum(map(sum, groups.values())), 1)
    shares = [
        Share(scheme=s, tensors=len(n), elements=sum(n), percent=100 * sum(n) / total, left=s == LEFT)
        for s, n in groups.items()
    ]
    return sorted(shares, key=lambda share: (share.left, -share.elements))


def _facts(report: Report) -> dict[str, dict[str, str]]:
    """Short lists of names and values for the foot of the page."""
    timing = {name.removesuffix("_seconds"): _duration(seconds) for name, seconds in report["timing"].items()}
    lists: dict[str, dict[str, Any]] = {
        "Versions": report["versions"],
        "Time": timing,
        "Training": report.get("training", {}),
        "Data": _flat(report.get("corpus", {})),
    }
    return {
        title: {name if title == "Versions" else name.replace("_", " "): _fact(value) for name, value in facts.items()}
        for title, facts in lists.items()
    }


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dicts within dicts as one, their keys joined by spaces."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
