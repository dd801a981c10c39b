"""metrics.csv in both forms, thinning, ticks, and coordinates that mean the values they stand for."""

from pathlib import Path
from typing import Any

import pytest

from qat.report.charts import layer_chart, line_chart, ticks
from qat.report.metrics import read_metrics, thin


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("column", ["name", "metric"])
def test_long_form(tmp_path: Path, column: str) -> None:
    text = f"step,arm,{column},value\n1,qat,loss,3.5\n1,control,loss,3.25\n2,qat,loss,3\n2,qat,lr,1e-3\n"
    curves = read_metrics(write(tmp_path / "m.csv", text))
    assert curves == {"loss": {"qat": [(1, 3.5), (2, 3.0)], "control": [(1, 3.25)]}, "lr": {"qat": [(2, 1e-3)]}}


def test_wide_form_with_blank_cells_and_a_torn_last_line(tmp_path: Path) -> None:
    text = "epoch,step,arm,train/loss,val/loss\n0,10,qat,3.5,\n0,10,qat,,3.7\n0,20,control,3.25,\n0,30,qat,3.\n0,x"
    curves = read_metrics(write(tmp_path / "m.csv", text))
    assert curves == {
        "train/loss": {"qat": [(10, 3.5), (30, 3.0)], "control": [(20, 3.25)]},
        "val/loss": {"qat": [(10, 3.7)]},
    }


def test_wide_form_without_arms_is_called_training(tmp_path: Path) -> None:
    assert read_metrics(write(tmp_path / "m.csv", "step,loss\n1,2\n")) == {"loss": {"training": [(1, 2.0)]}}


def test_rewritten_steps_count_once_and_non_finite_values_not_at_all(tmp_path: Path) -> None:
    text = "step,arm,name,value\n2,qat,loss,9\n1,qat,loss,8\n2,qat,loss,7\n3,qat,loss,nan\n4,qat,loss,inf\n"
    assert read_metrics(write(tmp_path / "m.csv", text)) == {"loss": {"qat": [(1, 8.0), (2, 7.0)]}}


def test_thinning_keeps_the_ends_and_the_mean() -> None:
    curve = [(step, float(step)) for step in range(1000)]
    thinned = thin(curve, 100)
    assert len(thinned) == 100
    assert (thinned[0][0], thinned[-1][0]) == (0, 999)
    assert sum(value for _, value in thinned) / 100 == pytest.approx(499.5)
    assert thin(curve[:7], 100) == curve[:7]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.14, 3.19), (-5e-7, 2e-6), (1e6, 9e6), (99.5, 101.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    values = ticks(low, high)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-9 * abs(low) <= value <= high + 1e-9 * abs(high) for value in values)


def coordinates(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split() for point in path.removeprefix("M").split("L"))]


def test_line_chart_puts_values_where_its_ticks_say() -> None:
    chart = line_chart("loss", {"qat": [(0, 2.0), (50, 1.0), (100, 1.5)]}, quant_start=25)
    points = coordinates(chart.lines[0].path)
    assert [x for x, _ in points] == [0, 500, 1000]
    tick = {t.label: 10 * t.at for t in chart.y_ticks}
    assert [y for _, y in points] == pytest.approx([tick["2.0"], tick["1.0"], (tick["1.0"] + tick["2.0"]) / 2], abs=0.1)
    assert {t.label: t.at for t in chart.x_ticks}["40"] == 40
    assert chart.mark == 25


@pytest.mark.parametrize("curve", [[(7, 3.0)], [(1, 0.0), (2, 0.0)], [(1, 5.0), (2, 5.0)]])
def test_flat_and_single_point_curves_are_drawn(curve: Any) -> None:
    chart = line_chart("loss", {"qat": curve})
    assert all(0 <= y <= 1000 for _, y in coordinates(chart.lines[0].path))


def test_fake_quant_is_marked_only_where_a_qat_curve_crosses_it() -> None:
    curve = [(0, 2.0), (100, 1.0)]
    assert line_chart("loss", {"control": curve}, quant_start=25).mark is None
    assert line_chart("loss", {"qat": curve}, quant_start=0).mark is None
    assert line_chart("loss", {"qat": curve}).mark is None


def layer(sqnr: float, clip: float = 0.0) -> Any:
    return {"name": f"l{sqnr}", "sqnr_db": sqnr, "clip_rate": clip, "bits": 4.5, "scheme": "int4"}


def test_layer_chart_scales_columns_and_finds_the_lowest() -> None:
    chart = layer_chart([layer(20.0 + i, 0.01 * i) for i in range(20)])
    assert [item["sqnr_db"] for item in chart.worst] == [20, 21, 22, 23, 24]
    assert [bar.worst for bar in chart.bars] == [True] * 5 + [False] * 15
    assert chart.bars[19].sqnr / chart.bars[0].sqnr == pytest.approx(39 / 20, rel=1e-3)
    assert chart.bars[19].clip / chart.bars[1].clip == pytest.approx(19, rel=1e-2)
    assert chart.bars[-1].x + chart.bars[-1].width < 1000
    assert chart.clipped


def test_layer_chart_of_few_or_negative_or_unclipped_layers() -> None:
    chart = layer_chart([layer(-3.0), layer(10.0)])
    assert [bar.sqnr for bar in chart.bars] == [0, pytest.approx(1000 / 1.05, abs=0.1)]
    assert not any(bar.worst for bar in chart.bars)
    assert not chart.clipped
