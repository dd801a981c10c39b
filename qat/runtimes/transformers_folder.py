"""Run a Hugging Face folder in transformers: without our package if its quant_method is not "qat", else with it.

The model lives in one more process (see plain_transformers.py), since this module cannot be imported without `qat`.
"""

import json
import os
import subprocess
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.models.positions import refuse_longer
from qat.progress import tell
from qat.runtimes import main
from qat.runtimes.environments import installed_in, interpreter, remedy

HELPERS = {
    "qat": "qat-as-shipped",
    **{name: name for name in ("compressed-tensors", "torchao")},
    **{name: "gptqmodel" for name in ("gptq", "awq")},  # in an environment of its own
}
SCRIPT = Path(__file__).with_name("plain_transformers.py")


def method(path: Path) -> str | None:
    """The folder's quant_method; None if it is a float model. Raises UserError if it is no Hugging Face folder."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path / 'config.json'} is missing or not valid JSON ({e})") from e
    return config.get("quantization_config", {}).get("quant_method")


def _says_absent(line: str, package: str) -> bool:
    """Whether a line of a traceback says that a package is missing."""
    return line.startswith(("ImportError", "ModuleNotFoundError", "ValueError")) and (
        package.replace("-", "_") in line.replace("-", "_") and ("install" in line or "No module" in line)
    )


class _Process:
    """A running plain_transformers.py; it ends with this process, whose end closes its standard input."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = tempfile.TemporaryDirectory(prefix="qat-transformers-")
        self.log = (Path(self.folder.name) / "log").open("w+b")
        command = [
            interpreter(HELPERS.get(method(path) or "", "")),
            "-P",
            str(SCRIPT),
            str(path),
            *(["--with-qat"] if method(path) == "qat" else []),
        ]
        self.child = subprocess.Popen(
            command,
            # gptqmodel compiles its kernels on the first token, for minutes; eager they compute the same
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, call: str, argument: Any) -> dict[str, Tensor]:
        """The answer of one function. Raises as `score` does."""
        answer = Path(self.folder.name, "answer.safetensors")
        if isinstance(argument, Tensor):
            save_file({"ids": argument.contiguous()}, Path(self.folder.name, "request.safetensors"))
            argument = str(Path(self.folder.name, "request.safetensors"))
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            print(json.dumps({"call": call, "argument": argument, "answer": str(answer)}), file=self.child.stdin)
            self.child.stdin.flush()
            while (said := self.child.stdout.readline()).startswith("progress "):
                tell(*map(int, said.split()[1:]))
        except BrokenPipeError:
            said = ""
        if said.strip() == "done":
            return load_file(answer)
        self.child.stdin.close()
        self.child.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        absent = next((p for p in HELPERS.values() if any(_says_absent(line, p) for line in lines)), None)
        if absent:
            raise UserError(f"{absent} is not installed: {remedy(absent)}")
        raise VerifyError(f"transformers cannot run {self.path}: {lines[-1] if lines else 'it ended without a word'}")


_process = cache(_Process)  # one for all the calls on a folder


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if a package is missing, VerifyError if transformers cannot load or run the folder.
    """
    return _process(path).ask("score", ids)["score"]


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    return _process(path).ask("logprobs", prompts)["logprobs"]


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """The folder's own tokenizer on each line, no special tokens added. Raises as `score` does."""
    answer = _process(path).ask("tokenize", lines)
    return [row.tolist() for row in answer["tokenize"].split(answer["lengths"].tolist())]


def complete(path: Path, request: str) -> str:
    """Generated text. request: JSON with `prompt`, `n_predict`, `temperature` and `seed`. Raises UserError if the
    prompt is empty, or with what follows does not fit into the model's positions; else as `score` does."""
    body = json.loads(request)
    (ids,) = tokenize(path, [body["prompt"]])
    if not ids:
        raise UserError("the prompt holds no token of this model: give other text")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    refuse_longer("the prompt and the new tokens", len(ids) + body["n_predict"], config)
    return bytes(_process(path).ask("complete", request)["complete"].tolist()).decode()


def version(path: Path, _: Tensor | str | None = None) -> str:
    """Which transformers runs here, and with what, for the report."""
    helper = HELPERS.get(method(path) or "")
    said = f"transformers {installed('transformers')}"
    try:
        return f"{said}, {helper} {installed_in(helper)}" if helper else said
    except PackageNotFoundError:  # a source tree that is not installed
        return f"{said}, {helper}"


if __name__ == "__main__":
    main(score, logprobs, tokenize, complete, version)
