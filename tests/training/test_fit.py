"""Training arms: resumed at any point they equal the uninterrupted one, quantizer state included."""

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import StopAt, gpt2, train
from torch import nn

from qat.conversion import fake_quantizers, prepare
from qat.errors import UserError
from qat.quantizers.lsq import LSQ
from qat.quantizers.observed import Observed
from qat.scheme import QuantSpec, Rule, Scheme
from qat.training.checkpoints import refuse_fewer_steps
from qat.training.schedule import QuantSchedule


def prepared() -> nn.Module:
    """int4 weights with learned scales, static int8 inputs."""
    weight = QuantSpec(qtype="int4", block=(1, 16))
    input_ = QuantSpec(qtype="int8", block=(-1, -1), scale="float32")
    rule = Rule(type="Conv1D", scheme=Scheme(weight=weight, input=input_, static=True))
    return prepare(gpt2(), [rule], weight=LSQ)


class StopAtValidation(pl.Callback):
    """Dies before or after the validation that follows optimiser step `step` has been looked at."""

    def __init__(self, step: int, after: bool) -> None:
        self.step, self.after = step, after

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not self.after:
            raise ConnectionAbortedError

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.after:
            raise ConnectionAbortedError


def checkpoint(run: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"]


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "items_per_second"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(StopAt(1), id="before-the-first-checkpoint"),
        pytest.param(StopAt(3), id="in-the-delay"),
        pytest.param(StopAtValidation(4, after=False), id="before-a-validation"),
        pytest.param(StopAtValidation(4, after=True), id="after-a-validation"),
        pytest.param(StopAt(5), id="after-the-delay"),
        pytest.param(StopAt(8), id="after-the-observers-froze"),
        pytest.param(StopAtValidation(10, after=False), id="before-the-last-validation"),
    ],
)
def test_interrupted_arm_ends_bit_identical(tmp_path: Path, death: pl.Callback) -> None:
    def schedule() -> QuantSchedule:
        return QuantSchedule(quant_start_step=4, observer_freeze_step=7)

    whole, cut = prepared(), prepared()
    train(whole, tmp_path / "whole", callbacks=[schedule()])
    with pytest.raises(ConnectionAbortedError):
        train(prepared(), tmp_path / "cut", callbacks=[schedule(), death])
    fitted = train(cut, tmp_path / "cut", callbacks=[schedule()])
    pairs = [(whole.state_dict(), cut.state_dict())]
    pairs += [
        tuple(checkpoint(tmp_path / run, name) for run in ("whole", "cut")) for name in ("last.ckpt", "best.ckpt")
    ]
    for expected, found in pairs:
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert fitted.steps == 10
    assert fitted.items == 10 * 2 * 3 * 16
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_metrics_continue_across_a_resume(tmp_path: Path) -> None:
    with pytest.raises(ConnectionAbortedError):
        train(gpt2(), tmp_path, callbacks=[StopAt(5)])
    train(gpt2(), tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, 11))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [4, 8, 10]


class Watch(QuantSchedule):
    """Notes at each batch whether the quantizers are on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        on = {quantizer.enabled for quantizer in fake_quantizers(pl_module).values()}
        self.seen = [*getattr(self, "seen", []), (trainer.global_step, on)]


def test_fake_quant_starts_at_its_step(tmp_path: Path) -> None:
    watch = Watch(quant_start_step=4)
    train(prepared(), tmp_path, callbacks=[watch])
    assert watch.seen == [(step, {step >= 4}) for step in range(10) for _ in range(2)]


def test_observers_stop_at_their_step(tmp_path: Path) -> None:
    def ranges(freeze: int | None, steps: int) -> list[torch.Tensor]:
        model, run = prepared(), tmp_path / f"{freeze}-{steps}"
        train(model, run, callbacks=[QuantSchedule(0, freeze)], max_steps=steps, lr=0.0)
        return [q.scale.clone() for q in fake_quantizers(model).values() if isinstance(q, Observed)]

    assert all(map(torch.equal, ranges(2, 2), ranges(2, 6)))
    assert not all(map(torch.equal, ranges(None, 2), ranges(None, 6)))


def test_best_weights_are_left_in_the_model(tmp_path: Path) -> None:
    model = gpt2()
    fitted = train(model, tmp_path)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(best["model.transformer.wte.weight"], model.transformer.wte.weight)
    with (tmp_path / "metrics.csv").open() as file:
        validations = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert fitted.best_loss == pytest.approx(min(validations), rel=1e-5)


def test_zero_steps_train_nothing(tmp_path: Path) -> None:
    assert train(gpt2(), tmp_path, max_steps=0).steps == 0
    assert list(tmp_path.iterdir()) == []


def test_without_an_end_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        train(gpt2(), tmp_path, max_steps=-1)


def test_non_finite_loss_names_step_layer_and_remedy(tmp_path: Path) -> None:
    model = gpt2()

    class Spoil(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x / 0 if self.calls > 5 else x

    model.transformer.h[1].mlp.act = Spoil()
    expected = r"step 2: first non-finite output in layer model\.transformer\.h\.1\.mlp\.act .*optimizer\.lr"
    with pytest.raises(UserError, match=expected):
        train(model, tmp_path)


def test_non_finite_gradient_stops_before_the_weights(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.h[0].attn.c_attn.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"gradients.* step 0, first in transformer\.h\.0\.attn\.c_attn\.weight"):
        train(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_finished_run_that_is_resumed_has_its_last_validation_once(tmp_path: Path) -> None:
    first = train(gpt2(), tmp_path)
    again = train(gpt2(), tmp_path)  # 10 steps with a validation at every fourth: the one at the end is made afterwards
    assert again.best_loss == first.best_loss
    assert [row["step"] for row in rows(tmp_path) if row["val/loss"]] == ["4", "8", "10"]
    assert [row["step"] for row in rows(tmp_path) if row["train/loss"]] == [str(step) for step in range(1, 11)]
    for fewer in (0, 9):
        with pytest.raises(UserError, match=rf"max_steps={fewer} is behind .*last\.ckpt, which is at step 10"):
            refuse_fewer_steps(tmp_path / "checkpoints", fewer)
    refuse_fewer_steps(tmp_path / "checkpoints", 10)
