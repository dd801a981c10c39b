"""What every runtime that gives logits makes of them: log-probabilities of windows, and after prompts.

llama.cpp and vLLM give log-probabilities themselves; plain_transformers.py may import nothing from here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat.progress import told

TOKENS = 2048  # whose logits are held at a time

# int64 token ids [n, T] -> float32 logits [n, T, V]
Logits = Callable[[Tensor], Tensor]


def window_score(logits: Logits, ids: Tensor, tokens: int = TOKENS) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) in nats, float32 [n, T-1], of int64 token ids [n, T], so many `tokens` a call
    (one row at least)."""
    out: list[Tensor] = []
    for rows in told(ids.split(max(1, tokens // ids.shape[1]))):
        logp = logits(rows)[:, :-1].log_softmax(-1)
        out.append(logp.gather(-1, rows[:, 1:, None]).squeeze(-1))
    return torch.cat(out)


def prompt_logprobs(logits: Logits, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities over the whole vocabulary after each prompt: float32 [n, V], nats. One prompt a call."""
    return torch.stack([logits(torch.tensor([p]))[0, -1].log_softmax(-1) for p in told(prompts)])
