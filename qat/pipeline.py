"""The stages of a run, in order. Plain objects in, a run folder out; knows nothing of Hydra.

Plug points: `prepare`, `calibrate` and PTQ evaluation go between the float evaluation and `fit`; `convert`, `export`
and `verify` after it. Each is a `with stages("name") as outcome:` block that sets `outcome.text`.
"""

import functools
import logging
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import nn

from qat.files import atomic_folder
from qat.models.base import Source
from qat.report.schema import Report, Stage, write_report
from qat.stages import Stages
from qat.training.fit import Checkpointing, Evaluation, Fitted, fit
from qat.training.module import evaluate
from qat.training.optim import Optimizer

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "datasets", "tokenizers")


def run(
    *,
    recipe: str,
    seed: int,
    run_dir: Path,
    model: Source,
    data: Any,
    task: Callable[..., pl.LightningModule],
    optimizer: Optimizer,
    trainer: functools.partial[pl.Trainer],
    logger: list[Logger],
    evaluation: Evaluation,
    checkpoint: Checkpointing,
    scheme: Any,
    quantizer: Any,
    quant_start_step: int,
    observer_freeze_step: int | None,
    control: bool,
    export: list[str],
) -> Report:
    """All stages of one recipe; writes RUN/report.json and, for a float run, RUN/model (a Hugging Face folder)."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips and device list are not outcomes
    pl.seed_everything(seed, verbose=False)
    stages = Stages()
    common = {"run_dir": run_dir, "data": data, "task": task, "optimizer": optimizer, "trainer": trainer}
    common |= {"loggers": logger, "evaluation": evaluation, "checkpoint": checkpoint, "console": stages.console}

    with stages("load") as outcome:
        loaded = model.load(data)
        data.attach(loaded.tokenizer)
        batch = data.evaluation(evaluation.split, evaluation.windows)
        size = sum(p.numel() for p in loaded.model.parameters())
        outcome.text = f"{loaded.name}, {size:,} parameters; {type(data).__name__}, {len(batch['labels'])} test windows"

    results: dict[str, Stage] = {}
    with stages("float") as outcome:
        results["float"] = measure(loaded.model, batch, data.batch_size)
        outcome.text = figures(results["float"])

    fitted = fit(loaded.model, arm="control", callbacks=[], best_from_step=0, **common)
    with stages("control") as outcome:
        results["control"] = measure(loaded.model, batch, data.batch_size)
        outcome.text = figures(results["control"])

    with stages("save") as outcome:
        with atomic_folder(run_dir / "model") as folder:
            loaded.model.save_pretrained(folder)  # type: ignore[operator]
            loaded.tokenizer.save_pretrained(folder)
        outcome.text = str(run_dir / "model")

    report: dict[str, Any] = {
        "recipe": recipe,
        "model": loaded.name,
        "data": data.describe()["name"],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(next(loaded.model.parameters()).device),
        "coverage": [],
        "stages": results,
        "exports": {},
        "timing": {**stages.timing, **step_timing(fitted)},
        "training": {"steps": fitted.steps, "items": fitted.items, "best_validation_loss": fitted.best_loss},
        "corpus": data.describe(),
    }
    write_report(report, run_dir / "report.json")  # type: ignore[arg-type]
    return report  # type: ignore[return-value]


def measure(model: nn.Module, batch: dict[str, torch.Tensor], batch_size: int) -> Stage:
    """Loss, perplexity and bytes of one arm."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {**evaluate(model, batch, batch_size=batch_size), "bytes": size}  # type: ignore[return-value]


def figures(stage: Stage) -> str:
    """One line of outcome."""
    return f"loss {stage['loss']:.4f}, perplexity {stage['perplexity']:.3f}"


def step_timing(fitted: Fitted) -> dict[str, float]:
    """`step_seconds`, if any step was made."""
    return {} if fitted.step_seconds is None else {"step_seconds": fitted.step_seconds}
