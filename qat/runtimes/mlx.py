"""Run an exported folder in MLX through mlx-lm, in MLX's own environment; on Linux, its CPU build.

Made with `python -m qat.runtimes.environments mlx`; this module runs there, on that environment's Python.
"""

import json
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.models.positions import refuse_longer
from qat.runtimes import main
from qat.runtimes.scoring import prompt_logprobs, window_score


@cache
def _model(path: Path) -> Any:
    try:
        import mlx.core as mx  # pyright: ignore[reportMissingImports]
        from mlx_lm.utils import load_model  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError("mlx-lm is not installed here: python -m qat.runtimes.environments mlx") from e
    mx.set_default_device(mx.cpu)
    try:
        return load_model(path)[0]
    except Exception as e:  # mlx's own exceptions share no base class
        raise VerifyError(f"mlx-lm cannot load {path}: {str(e)[:300]}") from e


def logits(path: Path, ids: Tensor) -> Tensor:
    """Float32 logits [n, T, V] of int64 token ids [n, T]. Raises as `score` does."""
    model = _model(path)
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(np.array(model(mx.array(ids.tolist())).astype(mx.float32)))


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if mlx-lm is missing, VerifyError if it cannot load the folder.
    """
    return window_score(lambda rows: logits(path, rows), ids)


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    return prompt_logprobs(lambda rows: logits(path, rows), prompts)


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """The folder's tokenizer, as mlx-lm loads it, on each line; no special tokens added."""
    from mlx_lm.tokenizer_utils import load  # pyright: ignore[reportMissingImports]

    tokenizer = load(path)
    return [list(tokenizer.encode(line, add_special_tokens=False)) for line in lines]


def complete(path: Path, request: str) -> str:
    """Generated text. request: JSON with `prompt`, `n_predict`, `temperature` and `seed`. Raises UserError if the
    prompt is empty, or with what follows does not fit into the model's positions; else as `score` does."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    from mlx_lm.generate import generate_step  # pyright: ignore[reportMissingImports]
    from mlx_lm.sample_utils import make_sampler  # pyright: ignore[reportMissingImports]
    from mlx_lm.tokenizer_utils import load  # pyright: ignore[reportMissingImports]

    body = json.loads(request)
    model, tokenizer = _model(path), load(path)
    ids: list[int] = tokenizer.encode(body["prompt"], add_special_tokens=False)
    if not ids:
        raise UserError("the prompt holds no token of this model: give other text")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    refuse_longer("the prompt and the new tokens", len(ids) + body["n_predict"], config)
    mx.random.seed(body.get("seed", 0))
    made: list[int] = []
    sampler = make_sampler(temp=body.get("temperature", 0))
    for token, _ in generate_step(mx.array(ids), model, max_tokens=body["n_predict"], sampler=sampler):
        if int(token) in tokenizer.eos_token_ids:
            break
        made.append(int(token))
    before, after = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids, ids + made))
    return after[len(before) :]


def version(path: Path, _: Tensor | str | None = None) -> str:
    """Which mlx runs here, for the report."""
    return f"mlx {installed('mlx')} ({_device()}), mlx-lm {installed('mlx-lm')}"


def _device() -> str:
    import mlx.core as mx  # pyright: ignore[reportMissingImports]

    return str(mx.default_device())


if __name__ == "__main__":
    main(logits, score, logprobs, tokenize, complete, version)
