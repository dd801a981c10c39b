"""A run small enough for a test: a folder of Python files as corpus, a GPT-2 of a few thousand weights."""

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from qat.data.stdlib import split_of

ROOT = Path(__file__).parents[1]
SMALL = {
    "data.block_size": 16,
    "data.batch_size": 2,
    "model.vocab_size": 300,
    "model.n_embd": 16,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.dropout": 0.2,
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "optimizer.warmup_steps": 3,
    "evaluation.windows": 4,
}


def corpus(folder: Path) -> Path:
    """A few real Python files for each split."""
    folder.mkdir(parents=True)
    text = inspect.getsource(textwrap)
    for split in ("train", "validation", "test"):
        names = [name for name in (f"m{i}.py" for i in range(200)) if split_of(name) == split][:2]
        for name in names:
            (folder / name).write_text(f"# {name}\n{text}")
    return folder


def command(*arguments: str, **overrides: object) -> list[str]:
    """`python train.py …` with the tiny sizes; keyword `a__b=1` is the override a.b=1."""
    given = {**SMALL, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return [sys.executable, str(ROOT / "train.py"), *arguments, *(f"{key}={value}" for key, value in given.items())]


def environment(cache: Path) -> dict[str, str]:
    """One thread and a cache of the test's own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "XDG_CACHE_HOME": str(cache)}


def call(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in the current folder."""
    return subprocess.run(arguments, env=environment(cache), capture_output=True, text=True, check=False)
