"""metrics.csv of a run as curves: metric → arm → points (step, value)."""

import csv
import math
from collections import defaultdict
from pathlib import Path

Curve = list[tuple[int, float]]
Curves = dict[str, dict[str, Curve]]


def read_metrics(path: Path) -> Curves:
    """Long form (`step,arm,name,value`; `metric` for `name`) or wide (`step`, perhaps `arm`, a column per metric).

    Blank and unreadable cells are skipped: a killed run may leave half a line. Where a resumed run wrote a step again,
    the later value counts. Without an `arm` column the arm is called "training". Non-finite values are left out.
    """
    points: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file, restval=""):
            step = _float(row.get("step"))
            if step is None:
                continue
            arm = row.get("arm") or "training"
            for name, cell in _cells(row):
                value = _float(cell)
                if value is not None:
                    points[name][arm][int(step)] = value
    return {name: {arm: sorted(at.items()) for arm, at in arms.items()} for name, arms in points.items()}


def _cells(row: dict[str, str]) -> list[tuple[str, str]]:
    name = row.get("name") or row.get("metric")
    if name and "value" in row:
        return [(name, row["value"])]
    if "value" in row:
        return []
    return [(key, cell) for key, cell in row.items() if key not in (None, "step", "arm", "epoch")]


def _float(cell: object) -> float | None:
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def thin(curve: Curve, most: int) -> Curve:
    """At most `most` points: means of neighbours at their middle step; the ends keep the first and last step."""
    size = max(1, math.ceil(len(curve) / most))
    buckets = [curve[start : start + size] for start in range(0, len(curve), size)]
    out = [(bucket[len(bucket) // 2][0], sum(value for _, value in bucket) / len(bucket)) for bucket in buckets]
    out[0] = (curve[0][0], out[0][1])
    out[-1] = (curve[-1][0], out[-1][1])
    return out
