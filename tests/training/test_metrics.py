"""metrics.csv: rows stay, arms are told apart, a torn line is dropped."""

import csv
from pathlib import Path

from qat.training.metrics import CsvMetrics


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_and_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = CsvMetrics(path, "qat")
    metrics.log_metrics({"train/loss": 2.5}, step=1)
    metrics.log_metrics({"val/loss": 2.25}, step=1)
    metrics.log_metrics({"train/loss": 2.0}, step=2)
    assert rows(path) == [
        {"step": "1", "arm": "qat", "train/loss": "2.5", "val/loss": ""},
        {"step": "1", "arm": "qat", "train/loss": "", "val/loss": "2.25"},
        {"step": "2", "arm": "qat", "train/loss": "2", "val/loss": ""},
    ]


def test_another_logger_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for arm in ("control", "qat"):
        metrics = CsvMetrics(path, arm)
        for step in (1, 2, 3):
            metrics.log_metrics({"train/loss": float(step)}, step=step)
    resumed = CsvMetrics(path, "qat")
    resumed.rewind(2)
    resumed.log_metrics({"train/loss": 9.0}, step=3)
    assert [(row["arm"], row["train/loss"]) for row in rows(path)] == [
        *(("control", loss) for loss in "123"),
        *(("qat", loss) for loss in "129"),
    ]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = CsvMetrics(path, "qat")
    for step in (10, 20):
        metrics.log_metrics({"train/loss": 1.0, "lr": 0.5}, step=step)
    text = path.read_text()
    for cut in range(len(text) - len("20,qat,1,0.5\n"), len(text)):
        path.write_text(text[:cut])
        resumed = CsvMetrics(path, "qat")
        resumed.rewind(10)
        resumed.log_metrics({"train/loss": 3.0, "lr": 0.5}, step=20)
        assert [row["train/loss"] for row in rows(path)] == ["1", "3"], cut
