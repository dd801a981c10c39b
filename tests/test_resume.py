"""A run killed with kill -9 and resumed ends with bit-identical weights, codes and figures."""

import csv
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


def rows(run: Path, arm: str) -> int:
    """Metrics rows of an arm so far."""
    path = run / "metrics.csv"
    return path.read_text().count(f",{arm},") if path.exists() else 0


def kill_when(arguments: list[str], cache: Path, reached: Callable[[], bool]) -> None:
    """Start a run and kill -9 it as soon as `reached()`."""
    process = subprocess.Popen(arguments, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not reached():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_quantized_run_killed_in_each_arm_ends_with_the_same_codes_and_figures(tmp_path: Path) -> None:
    library, whole, killed = corpus(tmp_path / "library"), tmp_path / "whole", tmp_path / "killed"
    cache, steps, delay = tmp_path / "cache", 100, 60

    def start(run: Path) -> list[str]:
        return command(
            "recipe=pretrain_gpt2_mini",
            "scheme=int4_g32",
            "quantizer=lsq",
            f"run_dir={run}",
            f"data.root='{library}'",
            control="true",
            quant_start_step=delay,
            model__n_embd=32,
            trainer__max_steps=steps,
            trainer__accumulate_grad_batches=2,
            trainer__log_every_n_steps=5,
            evaluation__every_n_steps=40,
            checkpoint__every_n_steps=7,
        )

    def step(path: Path) -> int:
        return torch.load(path, weights_only=True)["global_step"]

    done = call(start(whole), cache)
    assert done.returncode == 0, done.stderr
    resume = [*command()[:2], f"resume={killed}"]
    checkpoints = killed / "checkpoints"

    kill_when(start(killed), cache, lambda: rows(killed, "control") > 5)
    assert 0 < step(checkpoints / "control" / "last.ckpt") < steps
    assert not (checkpoints / "last.ckpt").exists()
    kill_when(resume, cache, lambda: rows(killed, "qat") > 5)
    assert step(checkpoints / "control" / "last.ckpt") == steps
    assert 0 < step(checkpoints / "last.ckpt") < delay
    assert not (killed / "frozen").exists()
    done = call(resume, cache)
    assert done.returncode == 0, done.stderr

    def frozen(run: Path) -> dict[str, str]:
        return json.loads((run / "frozen" / "manifest.json").read_text())["tensors"]

    def figures(run: Path) -> dict[str, Any]:
        return {k: v for k, v in json.loads((run / "report.json").read_text()).items() if k != "timing"}

    assert sum(name.endswith((".codes", ".words")) for name in frozen(whole)) >= 4
    assert frozen(killed) == frozen(whole)
    assert {"control", "ptq", "qat"} <= figures(whole)["stages"].keys()
    assert figures(killed) == figures(whole)
