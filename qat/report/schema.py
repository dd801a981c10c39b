"""report.json: its shape as types, the share of damage recovered, and a writer that never leaves half a file.

A key that does not apply is absent, never null: `"perplexity" in stage` is the test a script needs.
Units: losses in nats per target, `bytes` in bytes, `timing` in seconds, rates and `accuracy` as fractions of 1.
"""

import json
import math
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from qat.errors import UserError
from qat.files import atomic_write

PTQ_NOISE = 0.01
"""Nats. A smaller PTQ gap is not told from noise: another order of the same data moves a fine-tuned loss by as much."""


LEFT = "float"
"""The `scheme` of a parameter that no rule quantized."""


class Coverage(TypedDict):
    """One parameter. `scheme` names its grid, or is `LEFT` where it was left in float; `reason` says why."""

    name: str
    shape: list[int]
    scheme: str
    reason: str


class Stage(TypedDict):
    """One arm, evaluated: exactly one of `perplexity` (language) and `accuracy` (classification).

    `bytes`: what its parameters take; `bytes_quantized`: the part of it that is codes, scales and offsets.
    """

    loss: float
    perplexity: NotRequired[float]
    accuracy: NotRequired[float]
    bytes: int
    bytes_quantized: NotRequired[int]


class Stages(TypedDict, total=False):
    """The arms of the run. `control` is the float model fine-tuned for as many steps as `qat`."""

    float: Stage
    control: Stage
    ptq: Stage
    qat: Stage


class Export(TypedDict):
    """A written file, read back and run: figures are from `runtime`, not from the trained model.

    `path`: relative to the run folder, or absolute. `bytes`: the artefact on disk. `codes_equal` is about codes and
    stored scales, `weights_equal` about the weights dequantized in fp32; both, and `bits_per_weight`, are absent for a
    compiled file that cannot be read back. `unchecked`: what the runtime computes otherwise than training did, and what
    could not be compared. `runtime` and what follows are absent when no runtime could be started; `loss_diff`: nats
    more than the trained model's.
    """

    path: str
    bytes: int
    bytes_quantized: NotRequired[int]
    bits_per_weight: NotRequired[float]
    codes_equal: NotRequired[bool]
    weights_equal: NotRequired[bool]
    unchecked: NotRequired[list[str]]
    runtime: NotRequired[str]
    loss: NotRequired[float]
    loss_diff: NotRequired[float]
    perplexity: NotRequired[float]
    accuracy: NotRequired[float]
    max_logit_diff: NotRequired[float]


class Layer(TypedDict):
    """One quantized weight: signal over quantization noise in decibels, share of weights at a clipped edge."""

    name: str
    sqnr_db: float
    clip_rate: float
    bits: float
    scheme: str


class Fallback(TypedDict):
    """An offline stand-in: the hub id asked for, what was used in its place, and why."""

    requested: str
    used: str
    reason: str


class Report(TypedDict):
    """report.json as a whole. `training`: steps and items seen; `corpus`: the data module's description of itself."""

    recipe: str
    model: str
    data: str
    seed: int
    versions: dict[str, str]
    device: str
    coverage: list[Coverage]
    stages: Stages
    exports: dict[str, Export]
    timing: dict[str, float]
    recovered: NotRequired[float]
    layers: NotRequired[list[Layer]]
    fallback: NotRequired[list[Fallback]]
    training: NotRequired[dict[str, int | float]]
    corpus: NotRequired[dict[str, Any]]


def recovered(stages: Stages) -> float | None:
    """The share of PTQ's damage that training undid: 1 - (damage left / damage of PTQ), in loss.

    Damage of PTQ is `ptq - float`: both without training. Damage left is `qat - control`: both trained for the same
    steps on the same data. Without a control arm the float model stands in for it, which gives the usual
    `(ptq - qat) / (ptq - float)` and also credits QAT with what plain fine-tuning would have brought: it may pass 1.
    None, so that the key stays absent, when an arm is missing or PTQ cost less than `PTQ_NOISE`.
    """
    if "float" not in stages or "ptq" not in stages or "qat" not in stages:
        return None
    damage = stages["ptq"]["loss"] - stages["float"]["loss"]
    if damage < PTQ_NOISE:
        return None
    reference = stages.get("control", stages["float"])
    return 1 - (stages["qat"]["loss"] - reference["loss"]) / damage


def check_report(report: Report) -> None:
    """ValueError naming the first entry that is missing, null or not finite."""
    missing = Report.__required_keys__ - report.keys()
    if missing:
        raise ValueError(f"report lacks {', '.join(sorted(missing))}")
    _check_values(report, "report")
    for arm, stage in dict[str, Any](report["stages"]).items():
        if ("perplexity" in stage) == ("accuracy" in stage):
            raise ValueError(f"report.stages.{arm} needs exactly one of perplexity and accuracy")


def _check_values(value: object, where: str) -> None:
    if value is None:
        raise ValueError(f"{where} is null: leave out what does not apply")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: only finite numbers are reported")
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_values(entry, f"{where}.{key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _check_values(entry, f"{where}[{index}]")


def write_report(report: Report, path: Path) -> None:
    """Check the report, then write it atomically. ValueError, and `path` untouched, if an entry is not sound."""
    check_report(report)
    atomic_write(path, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(run_dir: Path) -> Report:
    """The report of a run folder; UserError if there is none or it is no JSON."""
    path = run_dir / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"{run_dir} has no report.json: the run has not finished; continue it with resume={run_dir}"
        raise UserError(message) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): run the recipe again or restore the file") from None
