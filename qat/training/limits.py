"""Refuses, before any work, settings of the trainer that it would take badly or only after the first evaluation."""

from functools import partial

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException

from qat.errors import UserError, at_least


def refuse_trainer(trainer: partial[pl.Trainer]) -> None:
    """Raises UserError for settings that Lightning refuses on this machine, and for those that make no sense here."""
    given = trainer.keywords
    if given.get("max_steps", -1) < 0:
        raise UserError("trainer.max_steps must be given, 0 or more: it is what ends a run")
    if given.get("precision") == "16-mixed":
        raise UserError("trainer.precision=16-mixed is not supported; use bf16-mixed")
    at_least("trainer.accumulate_grad_batches", given.get("accumulate_grad_batches", 1), 1)
    at_least("trainer.log_every_n_steps", given.get("log_every_n_steps", 1), 1)
    at_least("trainer.gradient_clip_val", given.get("gradient_clip_val") or 0, 0)  # below it, steps would go uphill
    try:
        trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"Lightning refuses the trainer.* settings: {why}") from error
