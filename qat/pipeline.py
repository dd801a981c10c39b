"""The stages of a run, in order, readable from top to bottom. Plain objects in, a run folder out; no Hydra here."""

import itertools
import logging
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import Tensor, nn

from qat import evaluation as evaluating
from qat import run_folder
from qat.auditing import Audit, audit
from qat.budget import choose_device, refuse_memory
from qat.conversion import WeightQuantizer, calibrate, convert, freeze_observers, prepare, set_fake_quant
from qat.data.stdlib import StdlibData
from qat.errors import UserError, VerifyError, at_least
from qat.exporters import refuse_caches, refuse_missing_runtimes, refuse_texts, refuse_tokenizers
from qat.files import atomic_folder, refuse_foreign
from qat.hub import Fallback
from qat.layers import layer_stats
from qat.models.load import EMBEDDED_CONTEXT, Loaded
from qat.models.positions import refuse_longer
from qat.modules.gelu import tanh_form
from qat.observers.base import Observer
from qat.promise import refuse_fallback
from qat.quantizers.bias import round_biases
from qat.rehearsal import rehearse
from qat.report.audit import print_audit
from qat.report.html import write_html
from qat.report.schema import Report, Stage, recovered, write_report
from qat.report.table import next_commands, result_table
from qat.scheme import Numerics
from qat.shipping import ship, tokenizer_files
from qat.stages import Stages
from qat.training.checkpoints import refuse_fewer_steps
from qat.training.fit import Checkpointing, Evaluation, Fitted, fit
from qat.training.limits import refuse_trainer
from qat.training.optim import Optimizer
from qat.training.schedule import QuantSchedule

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
    trainer: partial[pl.Trainer],
    logger: Sequence[Callable[..., Logger]],
    evaluation: Evaluation,
    checkpoint: Checkpointing,
    scheme: Numerics,
    quantizer: WeightQuantizer,
    observer: Callable[[], Observer],
    calibration_batches: int,
    quant_start_step: int,
    observer_freeze_step: int | None,
    control: bool,
    export: list[str],
    target: str | None,
    stand_ins: list[str] | None,
    config: dict[str, Any],
    quant_method: str | None = None,
) -> Report:
    """All stages of one recipe; leaves the run folder of docs/design.md, or for a float run RUN/model instead of codes.

    `run_dir` None means outputs/RECIPE/TIMESTAMP. `config` is the whole plain configuration, kept as RUN/config.yaml.
    Goes on from RUN/checkpoints where there are any. Raises UserError, or VerifyError once the report is written.
    """
    _quiet()
    refuse_trainer(trainer)
    if run_dir is not None:
        refuse_fewer_steps(run_dir / "checkpoints", trainer.keywords["max_steps"])
    at_least("calibration_batches", calibration_batches, 0)
    at_least("quant_start_step", quant_start_step, 0)
    at_least("observer_freeze_step", observer_freeze_step or 0, 0)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is not possible; give a number from 0 to {2**32 - 1}")
    pl.seed_everything(seed, verbose=False)
    progress = Stages()
    rules = scheme["rules"]
    simulated: Any = {key: value for key, value in scheme.items() if key != "rules"}
    refuse_missing_runtimes(export)
    for name in export if run_dir is not None else []:
        refuse_foreign(Path(run_dir or "", "export", name))
    if export and not rules:
        raise UserError(f"export={'+'.join(export)} needs a quantization scheme, and this run has scheme=none")

    device = choose_device(trainer, progress.console)
    with progress("load") as outcome:
        data, missed = _reached(data)
        loaded = model.load(data)
        size = sum(p.numel() for p in loaded.model.parameters())
        outcome.text = f"{loaded.source}, {size:,} parameters{refuse_memory(loaded.model, trainer, device)}"
    audited: Audit | None = None
    if rules:
        with progress("audit") as outcome:
            shipped = tanh_form(_config(loaded.model)) if scheme.get("gelu") else _config(loaded.model)
            audited = audit(loaded.model, rules, targets=export, config=shipped)
            refuse_tokenizers(export, tokenizer_files(loaded.tokenizer), _config(loaded.model))
            refuse_caches(export, scheme.get("kv_cache"))
            refuse_fallback(quant_method, audited, rules, {**shipped, **simulated})
            made: Any = {"weight": quantizer, "observer": observer, "calibration_batches": calibration_batches}
            rehearse(loaded.model, audited, rules, **simulated, **made)
            outcome.text = print_audit(audited, progress.console, exports=export)
    if loaded.fallback is not None:
        data.block_size = min(data.block_size, EMBEDDED_CONTEXT)
    refuse_longer("data.block_size", getattr(data, "block_size", 0), _config(loaded.model))
    refuse_texts(export, getattr(data, "block_size", 0), _config(loaded.model))
    with progress("data") as outcome:
        data.attach(loaded.tokenizer)
        batch = data.evaluation(evaluation.split, evaluation.windows)
        _refuse_task(task, batch)
        outcome.text = f"{data.describe()['name']}, {len(batch['labels'])} {evaluation.split} rows to score"
    fallback = [vars(f) for f in (loaded.fallback, missed) if f is not None]
    used = [f["used"] for f in fallback]
    if stand_ins is not None and stand_ins != used:
        was, now = (" and ".join(names) or "the hub itself" for names in (stand_ins, used))
        raise UserError(f"{run_dir} was made with {was}; with {now} it can't go on: resume it as it was, or start anew")
    title = recipe + "".join(f"-OFFLINE-{f['used']}" for f in fallback[:1])
    _warn_stand_in(fallback, progress)
    run_dir = run_dir or run_folder.default(title)
    run_folder.create(run_dir, {**config, "stand_ins": used})

    results: dict[str, Stage] = {}

    def measure(stage: str, net: nn.Module, label: str | None = None) -> dict[str, Tensor]:
        with progress(label or stage) as outcome:
            answers = evaluating.answer(net.to(device), batch, data.batch_size, outcome.track)
            entry: Any = {**evaluating.figures(answers), "bytes": _nbytes(net, audited, stage)}
            results[stage] = entry
            outcome.text = ", ".join(f"{k} {v:.4f}" for k, v in entry.items() if k != "bytes")
        return answers

    def train(arm: str, net: nn.Module, callbacks: list[pl.Callback], best_from_step: int) -> Fitted:
        return fit(
            net,
            arm=arm,
            run_dir=run_dir,
            folder=run_dir / "checkpoints" / arm if rules and arm == "control" else run_dir / "checkpoints",
            callbacks=callbacks,
            best_from_step=best_from_step,
            data=data,
            task=task,
            optimizer=optimizer,
            trainer=trainer,
            loggers=logger,
            evaluation=evaluation,
            checkpoint=checkpoint,
            console=progress.console,
        )

    measure("float", loaded.model)
    report: dict[str, Any] = {
        "recipe": title,
        "model": loaded.source,
        "data": data.describe()["name"],
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "device": str(device),
        "coverage": audited.coverage() if audited else [],
        "stages": results,
        "exports": {},
    }
    if fallback:
        report["fallback"] = fallback
    if control or not rules:
        fitted = train("control", loaded.model, [], 0)
        measure("control", loaded.model)
    wrong: list[UserError | VerifyError] = []
    if not rules:
        _save_float(loaded, run_dir / "model", progress)
    else:
        if control:
            pl.seed_everything(seed, verbose=False)  # as before the first load, whose weights may be random
            loaded = model.load(data)  # training changed the weights: start again from the same ones
        net = prepare(loaded.model, rules, weight=quantizer, observer=observer, **simulated).to(device)
        with progress("calibrate") as outcome:
            batches = list(itertools.islice(data.train_dataloader(), calibration_batches))
            calibrate(net, batches, partial(_forward, device), outcome.track)
        measure("ptq", net)
        fitted = train("qat", net, [QuantSchedule(quant_start_step, observer_freeze_step)], quant_start_step)
        set_fake_quant(net, True)
        freeze_observers(net)
        round_biases(net)  # integer runtimes add int32 biases on the grid of the sums: measure what they compute
        answers = measure("qat", net)
        evaluating.save(answers, run_dir / "evaluation.safetensors")
        with progress("convert") as outcome:
            report["layers"] = layer_stats(net)
            described = {**_config(net), "name": f"{title} {Path(loaded.source).name}"}
            files = tokenizer_files(loaded.tokenizer)
            frozen = convert(net, config=described, tokenizer=files, path=run_dir / "frozen")
            outcome.text = f"{len(frozen.weights)} tensors frozen, {frozen.nbytes():,} bytes"
        del net, loaded  # the exports are written without the float model
        facts: Any = {"title": described["name"], "data": report["data"], "stages": results, "fallback": fallback}
        report["exports"], wrong = ship(frozen, export, run_dir, progress, **facts)
        if (share := recovered(results)) is not None:  # type: ignore[arg-type]
            report["recovered"] = share

    report["training"] = _training(fitted)
    report["corpus"] = data.describe()
    report["timing"] = {
        **progress.timing,
        **({} if fitted.step_seconds is None else {"step_seconds": fitted.step_seconds}),
    }
    write_report(report, run_dir / "report.json")  # type: ignore[arg-type]
    write_html(run_dir)
    progress.console.print(result_table(report, progress.console))  # type: ignore[arg-type]
    for command in next_commands(report, run_dir):  # type: ignore[arg-type]
        progress.console.print(command, style="cyan", soft_wrap=True, markup=False)
    if wrong:
        raise wrong[0]
    return report  # type: ignore[return-value]


def _reached(data: Any) -> tuple[Any, Fallback | None]:
    """The data module, or the embedded corpus in its place where the hub cannot be reached and the recipe allows it."""
    missed = data.reach()
    if missed is None:
        return data, None
    same = {key: getattr(data, key) for key in ("block_size", "batch_size", "cache_dir", "seed", "workers")}
    return StdlibData(**{**same, "cache_dir": str(same["cache_dir"])}), missed


def _refuse_task(task: Callable[..., Any], batch: dict[str, Tensor]) -> None:
    kind = getattr(task, "func", task)
    if kind.field not in batch:
        raise UserError(
            f"{kind.__name__} reads {kind.field}, which these data do not have ({', '.join(batch)}): "
            "task=causal_lm is for text, task=classifier for digits, each with a model of its kind"
        )


def _forward(device: torch.device, net: nn.Module, batch: dict[str, Tensor]) -> None:
    if "input_ids" in batch:
        net(input_ids=batch["input_ids"].to(device), use_cache=False)
    else:
        net(batch["x"].to(device))


def _config(net: nn.Module) -> dict[str, Any]:
    """The description of the graph that exporters read: config.json, or a plain dict for other models."""
    config: Any = getattr(net, "config", {})
    return dict(config) if isinstance(config, dict) else {**config.to_dict(), "architectures": [type(net).__name__]}


def _nbytes(net: nn.Module, audited: Audit | None, stage: str) -> int:
    quantized = audited is not None and stage in ("ptq", "qat")
    return audited.nbytes if quantized and audited else sum(p.numel() * p.element_size() for p in net.parameters())


def _warn_stand_in(fallback: list[dict[str, Any]], progress: Stages) -> None:
    for f in fallback:
        text = f" {f['requested']} COULD NOT BE REACHED: this run uses {f['used']} in its place ({f['reason']}) "
        progress.console.print(text, style="bold black on yellow")


def _save_float(loaded: Loaded, path: Path, progress: Stages) -> None:
    with progress("save") as outcome:
        with atomic_folder(path) as folder:
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
        outcome.text = str(path)


def _training(fitted: Fitted) -> dict[str, Any]:
    """What the report says about training: steps, items (tokens) seen in all, best validation loss in nats."""
    best = {} if fitted.best_loss is None else {"best_validation_loss": fitted.best_loss}
    return {"steps": fitted.steps, "items": fitted.items, **best}


def _quiet() -> None:
    """Libraries' tips, device lists and progress bars are not outcomes of a run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
