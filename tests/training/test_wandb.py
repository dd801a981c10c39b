"""Weights & Biases never asks for an account."""

from pathlib import Path

import pytest

from qat.training.wandb import logged_in, wandb_logger


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_offline_without_a_key() -> None:
    assert not logged_in()


def test_a_key_or_a_netrc_entry_logs_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logged_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not logged_in()


def test_one_offline_run_takes_all_arms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "outputs" / "a run"
    for arm in ("control", "qat"):
        logger = wandb_logger(project="qat", run_dir=run, arm=arm)
        logger.log_metrics({"train/loss": 1.0}, step=1)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert {"control-train/loss", "qat-train/loss"} <= summary.keys()
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert "".join(capfd.readouterr()) == ""
