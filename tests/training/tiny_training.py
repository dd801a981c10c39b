"""Random token windows and a tiny GPT-2 with dropout, for tests of the training code in one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from qat.data.base import TokenData
from qat.training.fit import Checkpointing, Evaluation, Fitted, fit
from qat.training.module import CausalLM
from qat.training.optim import Optimizer


class Numbers(TokenData):
    """Packed windows of small integers: no tokenizer is needed, `windows` is given."""

    def rows(self, split: str) -> Dataset:
        raise AssertionError("windows are given")

    def windows(self, split: str) -> Dataset:
        generator = torch.Generator().manual_seed(len(split))
        ids = torch.randint(0, 40, (12, self.block_size), generator=generator).tolist()
        return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


def gpt2(dropout: float = 0.3) -> GPT2LMHeadModel:
    """Two layers, vocabulary 64."""
    torch.manual_seed(0)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, **drop))


class StopAt(pl.Callback):
    """Dies in the middle of optimiser step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and (args[-1] + 1) % trainer.accumulate_grad_batches == 0:
            raise ConnectionAbortedError


def train(model: Any, run: Path, *, callbacks: Any = (), lr: float = 1e-2, **trainer: Any) -> Fitted:
    """`fit` with small settings: 10 steps of 2 accumulated batches, a checkpoint at every second step."""
    pl.seed_everything(1, verbose=False)
    torch.seed()  # the state that an arm finds depends on what ran before it
    settings = {"max_steps": 10, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1}
    settings |= {"accelerator": "cpu", "devices": 1, **trainer}
    return fit(
        model,
        arm="qat",
        run_dir=run,
        folder=run / "checkpoints",
        data=Numbers(block_size=16, batch_size=3, seed=5),
        task=CausalLM,
        optimizer=Optimizer(lr=lr, warmup_steps=2, scale_lr=0.1),
        trainer=partial(pl.Trainer, **settings),
        loggers=[],
        evaluation=Evaluation(every_n_steps=4),
        checkpoint=Checkpointing(every_n_steps=2),
        callbacks=list(callbacks),
        best_from_step=0,
        console=Console(quiet=True),
    )
