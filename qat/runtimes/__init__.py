"""Run a written file in its real runtime, in a fresh process: `run("llama_cpp", folder, score=ids)`.

A runtime is one file here with plain functions of `(path, argument)`, and ends with `main(functions...)`. The request
and the answer are safetensors files with one entry per call, so one process can do several calls on the same artefact.
To add a runtime: write that file; its name is the registry.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.runtimes.environments import interpreter

Value = Tensor | Sequence[Sequence[int]] | Sequence[str] | str


def _write(values: dict[str, Value], file: Path) -> None:
    """Tensors as they are; rows of ints or strings as one flat tensor and their lengths; one string as metadata."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous()
        elif isinstance(value, str):
            metadata[name] = json.dumps(value)
        else:
            text = any(isinstance(row, str) for row in value)
            rows = [row.encode() if isinstance(row, str) else row for row in value]
            metadata[name] = "lines" if text else "rows"
            tensors[name] = torch.tensor([i for row in rows for i in row], dtype=torch.uint8 if text else torch.int64)
            tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    save_file(tensors, file, metadata)


def _read(file: Path) -> dict[str, Any]:
    """The inverse of `_write`."""
    values: dict[str, Any] = {}
    with safe_open(file, "pt") as f:
        metadata = f.metadata() or {}
        for name in f.keys():  # noqa: SIM118
            if name not in metadata and not name.endswith(".lengths"):
                values[name] = f.get_tensor(name)
        for name, kind in metadata.items():
            if kind not in ("lines", "rows"):
                values[name] = json.loads(kind)
                continue
            rows = f.get_tensor(name).split(f.get_tensor(f"{name}.lengths").tolist())
            values[name] = [bytes(r.tolist()).decode() if kind == "lines" else r.tolist() for r in rows]
    return values


def environment() -> dict[str, str]:
    """This process's environment, in which another Python finds this package even where it is not installed."""
    package_root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))}


def run(runtime: str, path: Path, *, timeout: float = 1800.0, **calls: Value) -> dict[str, Any]:
    """Call functions of `qat/runtimes/RUNTIME.py` on the artefact at `path` in a process of their own.

    `calls`: function name -> its argument (a tensor, rows of ints, or lines of text); the result has the same keys.
    Raises UserError (the runtime is not installed, or `timeout` seconds passed), VerifyError (it cannot run the file).
    """
    with tempfile.TemporaryDirectory(prefix="qat-runtime-") as folder:
        request, answer = Path(folder, "request.safetensors"), Path(folder, "answer.safetensors")
        _write(calls, request)
        command = [
            interpreter(runtime),
            "-m",
            f"qat.runtimes.{runtime}",
            request,
            answer,
            "--path",
            Path(path).absolute(),
        ]
        try:
            done = subprocess.run(
                [str(c) for c in command],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"{runtime} did not finish within {timeout:g} s on {path}; score less text") from None
        if done.returncode == 0:
            return _read(answer)
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with code {done.returncode}"]
        if done.returncode == 2:
            raise UserError(said[-1])
        raise VerifyError(f"{runtime} cannot run {path}: " + " | ".join(said[-3:]))


def main(*functions: Callable[..., Any]) -> None:
    """The command line of every runtime, `python -m qat.runtimes.X REQUEST ANSWER --path PATH`: exits 0, 2 or 3."""
    parser = argparse.ArgumentParser()
    parser.add_argument("request", type=Path)
    parser.add_argument("answer", type=Path)
    parser.add_argument("--path", type=Path, required=True)
    args = parser.parse_args()
    known = {function.__name__: function for function in functions}
    try:
        answers = {name: known[name](args.path, value) for name, value in _read(args.request).items()}
    except (UserError, VerifyError) as error:
        print(error, file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 3)
    _write(answers, args.answer)
