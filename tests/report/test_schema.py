"""The share recovered, and a report.json that holds only what applies."""

import json
import math
from typing import Any

import pytest
import sample

from qat.errors import UserError
from qat.report.schema import PTQ_NOISE, check_report, read_report, recovered, write_report


def stages(**losses: float) -> Any:
    return {arm: sample.language_stage(loss, 1) for arm, loss in losses.items()}


def test_recovered_without_control_is_the_usual_share() -> None:
    assert recovered(stages(float=3.0, ptq=3.2, qat=3.05)) == pytest.approx((3.2 - 3.05) / (3.2 - 3.0))


def test_recovered_with_control_ignores_what_plain_fine_tuning_brings() -> None:
    """Float, control and QAT all 0.5 lower by fine-tuning alone: the share is the same as if there had been none."""
    assert recovered(stages(float=3.0, ptq=3.2, qat=2.55, control=2.5)) == pytest.approx(0.75)
    assert recovered(stages(float=3.0, ptq=3.2, qat=2.55)) == pytest.approx(
        3.25
    )  # what leaving control out would claim


def test_recovered_may_be_negative() -> None:
    assert recovered(stages(float=3.0, ptq=3.2, qat=3.4, control=2.9)) == pytest.approx(-1.5)


def test_recovered_is_undefined_where_ptq_cost_nothing_measurable() -> None:
    assert recovered(stages(float=3.0, ptq=3.0 + 0.9 * PTQ_NOISE, qat=3.0)) is None
    assert recovered(stages(float=3.0, ptq=2.9, qat=3.0)) is None
    assert recovered(stages(float=3.0, ptq=3.0 + 1.1 * PTQ_NOISE, qat=3.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("missing", ["float", "ptq", "qat"])
def test_recovered_needs_three_arms(missing: str) -> None:
    arms = stages(float=3.0, ptq=3.2, qat=3.1)
    del arms[missing]
    assert recovered(arms) is None


def test_written_report_reads_back(tmp_path: Any) -> None:
    report = sample.language_report()
    write_report(report, tmp_path / "report.json")
    assert read_report(tmp_path) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def broken(**entries: Any) -> Any:
    return sample.classifier_report() | entries


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (broken(recovered=None), r"report\.recovered is null"),
        (broken(timing={"step_seconds": math.nan}), r"report\.timing\.step_seconds is nan"),
        (broken(layers=[{"sqnr_db": math.inf}]), r"report\.layers\[0\]\.sqnr_db is inf"),
        (broken(stages={"float": {"loss": 1.0, "bytes": 1}}), r"stages\.float needs exactly one of"),
        (broken(stages={"qat": sample.language_stage(1.0, 1) | {"accuracy": 0.5}}), r"stages\.qat needs exactly one"),
        ({"recipe": "x"}, "lacks coverage, data, device, exports, model, seed, stages, timing, versions"),
    ],
)
def test_unsound_report_is_refused_and_the_old_one_stays(tmp_path: Any, report: Any, message: str) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(ValueError, match=message):
        write_report(report, tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == "old"


@pytest.mark.parametrize("kind", [sample.language_report, sample.classifier_report, sample.pretrain_report])
def test_samples_are_sound_json(kind: Any) -> None:
    check_report(kind())
    assert json.loads(json.dumps(kind())) == kind()


def test_unreadable_reports_name_the_remedy(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"has no report\.json.*resume="):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_report(tmp_path)
