"""Run a .pte in ExecuTorch's Python runtime, in its own environment, through the program's KV cache.

Made with `python -m qat.runtimes.environments executorch`; this module runs there, on that environment's Python.
"""

import json
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.runtimes import main
from qat.runtimes.scoring import prompt_logprobs, window_score


class _Program:
    def __init__(self, path: Path) -> None:
        try:
            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UserError("executorch is not installed here: python -m qat.runtimes.environments executorch") from e
        file = path / "model.pte" if path.is_dir() else path
        try:
            self.program = Runtime.get().load_program(str(file))
            self.forward = self.program.load_method("forward")
            self.room, self.chunk = self._constant("get_max_context_len"), self._constant("get_max_seq_len")
        except RuntimeError as e:
            raise VerifyError(f"ExecuTorch cannot load {file}: {str(e)[:300]}") from e

    def _constant(self, name: str) -> int:
        return int(self.program.load_method(name).execute([])[0])

    def logits(self, ids: list[int], start: int = 0) -> Tensor:
        """Float32 (T, vocabulary) of T tokens that follow the `start` tokens in the cache."""
        if not ids or start + len(ids) > self.room:
            raise UserError(f"{start + len(ids)} tokens were given: the program's KV cache holds 1 to {self.room}")
        out = []
        for i in range(0, len(ids), self.chunk):
            part = torch.tensor([ids[i : i + self.chunk]])
            at = torch.arange(start + i, start + i + part.shape[1])
            out.append(self.forward.execute([part, at])[0][0].clone())  # the next call overwrites it
        return torch.cat(out)


_program = cache(_Program)


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if executorch is missing or T exceeds the cache, VerifyError if it cannot load the program.
    """
    return window_score(lambda rows: logits(path, rows), ids, tokens=1)  # the program takes one row


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    return prompt_logprobs(lambda rows: logits(path, rows), prompts)


def logits(path: Path, ids: Tensor) -> Tensor:
    """Float32 logits [n, T, V] of int64 token ids [n, T], the whole row a chunk. Raises as `score` does."""
    return torch.stack([_program(path).logits(row.tolist()) for row in ids])


def stepwise(path: Path, ids: Tensor) -> Tensor:
    """`logits` as generation computes them: one token a call, the others from the cache."""
    return torch.stack([torch.cat([_program(path).logits([t], i) for i, t in enumerate(r)]) for r in ids.tolist()])


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path if path.is_dir() else path.parent)


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """The folder's tokenizer on each line; no special tokens added."""
    tokenizer = _tokenizer(path)
    return [list(tokenizer.encode(line, add_special_tokens=False)) for line in lines]


def complete(path: Path, request: str) -> str:
    """Generated text. request: JSON with `prompt`, `n_predict`, `temperature` and `seed`. Raises as `score` does."""
    body = json.loads(request)
    tokenizer, program = _tokenizer(path), _program(path)
    ids: list[int] = tokenizer.encode(body["prompt"], add_special_tokens=False)
    random = torch.Generator().manual_seed(body.get("seed", 0))
    made: list[int] = []
    if len(ids) + body["n_predict"] > program.room:
        raise UserError(f"{len(ids)} tokens and {body['n_predict']} new ones exceed the cache's {program.room}")
    last = program.logits(ids)[-1]
    for _ in range(body["n_predict"]):
        if heat := body.get("temperature", 0):
            made.append(int(torch.multinomial((last / heat).softmax(-1), 1, generator=random)))
        else:
            made.append(int(last.argmax()))
        if made[-1] == tokenizer.eos_token_id:
            break
        last = program.logits(made[-1:], len(ids) + len(made) - 1)[-1]
    return tokenizer.decode(made, skip_special_tokens=True)


def version(path: Path, _: Tensor | str | None = None) -> str:
    """Which executorch runs here, for the report."""
    return f"executorch {installed('executorch')} (XNNPACK)"


if __name__ == "__main__":
    main(logits, stepwise, score, logprobs, tokenize, complete, version)
