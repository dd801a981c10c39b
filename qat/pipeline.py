"""The stages of a run, in order. Plain objects in, a run folder out; knows nothing of Hydra.

Plug points, marked PLUG below: `audit` before the folder is made (it refuses); `prepare`, `calibrate` and the PTQ
evaluation before `fit`; `convert`, `export` and `verify` after it. Each is a `with stages("name") as outcome:` block
that sets `outcome.text`, its one line of outcome.
"""

import functools
import logging
import math
import platform
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn

from qat import run_folder
from qat.evaluation import answer_text, mean_loss
from qat.files import atomic_folder
from qat.models.load import Loaded
from qat.report.schema import Report, Stage, write_report
from qat.stages import Stages
from qat.training.fit import Checkpointing, Evaluation, Fitted, fit
from qat.training.optim import Optimizer

LIBRARIES = ("torch", "pytorch-lightning", "transformers", "datasets", "tokenizers")


class Source(Protocol):
    """`model=` of a recipe: cheap to build, so that a typo is found early; `load` does the work."""

    def load(self, data: Any) -> Loaded:
        """Load or build the model; `data` is the run's data module, for a source that learns a tokenizer from it."""
        ...


def run(
    *,
    recipe: str,
    seed: int,
    run_dir: Path | None,
    model: Source,
    data: Any,
    task: Callable[..., Any],
    optimizer: Optimizer,
    trainer: functools.partial[pl.Trainer],
    logger: Sequence[Callable[..., Logger]],
    evaluation: Evaluation,
    checkpoint: Checkpointing,
    scheme: Any,
    quantizer: Any,
    quant_start_step: int,
    observer_freeze_step: int | None,
    control: bool,
    export: list[str],
    config: dict[str, Any],
) -> Report:
    """All stages of one recipe; writes RUN/report.json and, for a float run, RUN/model (a Hugging Face folder).

    `run_dir` None means outputs/RECIPE/TIMESTAMP. `config` is the whole plain configuration, kept as RUN/config.yaml.
    Goes on from RUN/checkpoints where there are any. Raises UserError and VerifyError.
    """
    _quiet()
    pl.seed_everything(seed, verbose=False)
    stages = Stages()

    with stages("load") as outcome:
        loaded = model.load(data)
        data.attach(loaded.tokenizer)
        batch = data.evaluation(evaluation.split, evaluation.windows)
        size = sum(p.numel() for p in loaded.model.parameters())
        windows = f"{len(batch['labels'])} windows of its {evaluation.split} split"
        outcome.text = f"{loaded.source}, {size:,} parameters; {type(data).__name__}, {windows}"

    # PLUG audit

    run_dir = run_dir or run_folder.default(recipe)
    run_folder.create(run_dir, config)
    results: dict[str, Stage] = {}
    with stages("float") as outcome:
        results["float"] = measure(loaded.model, batch, data.batch_size)
        outcome.text = figures(results["float"])

    # PLUG prepare, calibrate, ptq. The arm that is trained is then "qat", its callbacks [QuantSchedule(...)],
    # best_from_step=quant_start_step; with control=true a copy of the float model is fitted in checkpoints/control.
    arm = "control"
    fitted = fit(
        loaded.model,
        arm=arm,
        run_dir=run_dir,
        folder=run_dir / "checkpoints",
        callbacks=[],
        best_from_step=0,
        data=data,
        task=task,
        optimizer=optimizer,
        trainer=trainer,
        loggers=logger,
        evaluation=evaluation,
        checkpoint=checkpoint,
        console=stages.console,
    )
    with stages(arm) as outcome:
        results[arm] = measure(loaded.model, batch, data.batch_size)
        outcome.text = figures(results[arm])

    # PLUG convert, export, verify
    with stages("save") as outcome:
        with atomic_folder(run_dir / "model") as folder:
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
        outcome.text = str(run_dir / "model")

    report: dict[str, Any] = {
        "recipe": recipe,
        "model": loaded.source,
        "data": data.describe()["name"],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(next(loaded.model.parameters()).device),
        "coverage": [],
        "stages": results,
        "exports": {},
        "timing": {**stages.timing, **step_timing(fitted)},
        "training": training(fitted),
        "corpus": data.describe(),
    }
    if loaded.fallback is not None:
        report["fallback"] = [vars(loaded.fallback)]
    write_report(report, run_dir / "report.json")  # type: ignore[arg-type]
    return report  # type: ignore[return-value]


def measure(model: nn.Module, batch: dict[str, Tensor], batch_size: int) -> Stage:
    """Loss, perplexity and bytes of one arm."""
    loss = mean_loss(answer_text(model, batch, batch_size)["nll"], batch["labels"])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"loss": loss, "perplexity": math.exp(loss), "bytes": size}


def figures(stage: Stage) -> str:
    """One line of outcome."""
    return f"loss {stage['loss']:.4f}, perplexity {stage['perplexity']:.3f}"


def training(fitted: Fitted) -> dict[str, Any]:
    """What the report says about training: steps, items (tokens) seen in all, best validation loss in nats."""
    best = {} if fitted.best_loss is None else {"best_validation_loss": fitted.best_loss}
    return {"steps": fitted.steps, "items": fitted.items, **best}


def step_timing(fitted: Fitted) -> dict[str, float]:
    """`step_seconds`, if any step was made."""
    return {} if fitted.step_seconds is None else {"step_seconds": fitted.step_seconds}


def _quiet() -> None:
    """Libraries' tips, device lists and progress bars are not outcomes of a run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
