"""A run killed with kill -9 and resumed ends with bit-identical weights and the same metrics.csv."""

import csv
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_run import call, command, corpus, environment


def losses(run: Path) -> dict[str, str]:
    """Training loss by step, as written."""
    with (run / "metrics.csv").open() as file:
        return {row["step"]: row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def test_kill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    def start(run: Path) -> list[str]:
        return command(
            "recipe=pretrain_gpt2_mini",
            f"run_dir={run}",
            f"data.root='{library}'",
            trainer__max_steps=150,
            trainer__accumulate_grad_batches=3,
            trainer__log_every_n_steps=5,
            evaluation__every_n_steps=40,
            checkpoint__every_n_steps=7,
        )

    library, whole, killed = corpus(tmp_path / "library"), tmp_path / "whole", tmp_path / "killed (1), a=b"
    done = call(start(whole), tmp_path / "cache")
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen(start(killed), env=environment(tmp_path / "cache"), stderr=subprocess.PIPE)
    metrics = killed / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > 8):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    step = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 150
    assert not (killed / "report.json").exists()

    resumed = call([*command()[:2], f"resume={killed}"], tmp_path / "cache")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, killed)]
    assert all(torch.equal(last[0]["state_dict"][name], last[1]["state_dict"][name]) for name in last[0]["state_dict"])
    assert last[0]["global_step"] == last[1]["global_step"] == 150
    # a row that straddles the resumed step averages over fewer batches; all others are the same
    differing = {step for step, loss in losses(whole).items() if losses(killed)[step] != loss}
    assert len(differing) <= 1
