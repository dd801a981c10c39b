"""Packing: nothing lost, nothing padded, cached by content, the same windows for everyone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from qat.data.base import FLUSH, TokenData, _blocks
from qat.errors import UserError


class Backend:
    def to_str(self) -> str:
        return "words"


class Words:
    """A tokenizer of whole words: id = its number; counts its calls."""

    eos_token_id = 0
    chat_template = None
    backend_tokenizer = Backend()
    calls = 0

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        type(self).calls += 1
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


class Given(TokenData):
    """Rows of the test's choosing."""

    def __init__(self, texts: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.texts = texts

    def rows(self, split: str) -> Dataset:
        return Dataset.from_dict({"text": self.texts})


class Masked(Given):
    """No loss on even tokens."""

    def encode(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encoded = super().encode(batch)
        labels = [[i if i % 2 else -100 for i in row] for row in encoded["input_ids"]]
        return {**encoded, "labels": labels}


def make(tmp_path: Path, texts: list[str], kind: type[Given] = Given, **options: Any) -> Given:
    data = kind(texts, **{"block_size": 5, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **options})
    data.attach(Words())
    return data


TEXTS = ["1 2 3", "4 5 6 7 8 9 10", "", "11", "12 13 14 15 16 17"]


def test_documents_are_joined_and_cut(tmp_path: Path) -> None:
    ids = make(tmp_path, TEXTS).windows("train")["input_ids"][:]
    stream = [1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 10, 0, 0, 11, 0, 12, 13, 14, 15, 16, 17, 0]
    assert ids.flatten().tolist() == stream[:20]
    assert ids.dtype == torch.int64
    assert ids.shape == (4, 5)


def test_labels_travel_with_their_tokens(tmp_path: Path) -> None:
    window = make(tmp_path, TEXTS, Masked).windows("train")[1]
    assert window["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert window["labels"].tolist() == [5, -100, 7, -100, 9]


def test_packing_does_not_depend_on_how_much_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(map(str, range(1, 1 + i % 37))) for i in range(900)]
    tokens = Dataset.from_list([{"input_ids": [*map(int, t.split())], "labels": [*map(int, t.split())]} for t in texts])
    whole = [row for ids, _ in _blocks(tokens, 7) for row in ids.tolist()]
    monkeypatch.setattr("qat.data.base.FLUSH", 100)
    assert FLUSH > 100
    assert [row for ids, _ in _blocks(tokens, 7) for row in ids.tolist()] == whole
    flat = [i for text in texts for i in map(int, text.split())]
    assert whole == [flat[at : at + 7] for at in range(0, len(flat) - 6, 7)]


def test_cache_is_used_again_and_follows_the_content(tmp_path: Path) -> None:
    first = make(tmp_path, TEXTS).windows("train")[:]
    before = Words.calls
    again = make(tmp_path, TEXTS).windows("train")[:]
    assert Words.calls == before
    assert torch.equal(first["input_ids"], again["input_ids"])
    for other in (make(tmp_path, [*TEXTS, "9"]), make(tmp_path, TEXTS, block_size=4), make(tmp_path, TEXTS, Masked)):
        before = Words.calls
        other.windows("train")
        assert Words.calls > before
    assert not [path for path in (tmp_path / "cache" / "packed").iterdir() if path.suffix != ".arrow"]


def test_parallel_tokenisation_gives_the_same_windows(tmp_path: Path) -> None:
    texts = [f"{i} {i + 1}" for i in range(1, 40)]
    alone = make(tmp_path / "a", texts).windows("train")[:]["input_ids"]
    together = make(tmp_path / "b", texts, workers=2).windows("train")[:]["input_ids"]
    assert torch.equal(alone, together)


def test_evaluation_windows_are_spread_and_fixed(tmp_path: Path) -> None:
    data = make(tmp_path, [" ".join(map(str, range(1, 500)))])
    everything = data.windows("test")["input_ids"][:]
    chosen = data.eval_ids("test", 4)
    assert chosen.shape == (4, 5)
    assert torch.equal(chosen[0], everything[0])
    assert torch.equal(chosen[-1], everything[-1])
    assert torch.equal(chosen, data.eval_ids("test", 4))
    assert torch.equal(data.eval_ids("test"), everything)
    assert torch.equal(data.eval_ids("test", 10**6), everything)


def test_loaders(tmp_path: Path) -> None:
    data = make(tmp_path, [" ".join(map(str, range(1, 100)))])
    batch = next(iter(data.train_dataloader()))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "input_ids": ((2, 5), torch.int64),
        "labels": ((2, 5), torch.int64),
    }
    rows = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    assert torch.equal(rows, data.windows("validation")["input_ids"][:])


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train split has fewer than data\.block_size=50 tokens"):
        make(tmp_path, TEXTS, block_size=50).windows("train")


def test_a_tokenizer_without_an_end_is_an_error(tmp_path: Path) -> None:
    class Endless(Words):
        eos_token_id = None

    with pytest.raises(UserError, match="end-of-text"):
        make(tmp_path, TEXTS).attach(Endless())


@pytest.mark.parametrize("key", ["block_size", "batch_size"])
def test_impossible_sizes(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"data.{key}=0"):
        make(tmp_path, TEXTS, **{key: 0})
