"""Log-probabilities from logits: the right tokens' whatever the size of a call, and each call is told."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qat.progress import follow
from qat.runtimes.scoring import prompt_logprobs, window_score

TABLE = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))  # logits after a token


def logits(ids: Tensor) -> Tensor:
    return TABLE[ids]


@pytest.mark.parametrize("tokens", [1, 9, 2048])
def test_windows(tokens: int) -> None:
    ids = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(1))
    calls: list[int] = []

    def counted(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return logits(rows)

    want = [[float(TABLE[a].softmax(-1)[b].log()) for a, b in pairwise(row)] for row in ids.tolist()]
    torch.testing.assert_close(window_score(counted, ids, tokens), torch.tensor(want))
    assert calls == {1: [1] * 5, 9: [2, 2, 1], 2048: [5]}[tokens]


def test_prompts_of_any_length_are_told_one_by_one() -> None:
    seen: list[tuple[int, int]] = []
    with follow(lambda done, total: seen.append((done, total))):
        found = prompt_logprobs(logits, [[1], [2, 3], [0, 5, 6]])
    torch.testing.assert_close(found, TABLE[[1, 3, 6]].log_softmax(-1))
    assert seen[-1] == (3, 3)
