"""Packed next-token data: rows of text in, memory-mapped windows of `block_size` tokens out, cached by content.

To add a data set: subclass `TokenData`, implement `rows(split)`; override `encode` where the loss must not see
every token (chat). Everything else (tokenisation, packing, cache, loaders, evaluation windows) is here.
"""

import hashlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pytorch_lightning as pl
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader

from qat.errors import UserError, at_least, disk_errors
from qat.files import refuse_unwritable
from qat.hub import Fallback
from qat.training.sampler import StepSampler

Split = Literal["train", "validation", "test"]
Batch = dict[str, torch.Tensor]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "qat"
FLUSH = 1 << 20  # tokens held in memory while packing


class TokenData(pl.LightningDataModule, ABC):
    """Next-token windows of one tokenizer over one corpus.

    `attach(tokenizer)` comes first; batches are {"input_ids": int64 [B, T], "labels": int64 [B, T]} with labels
    unshifted as in transformers (-100 = ignored).
    """

    text_column: str = "text"

    def __init__(
        self, *, block_size: int, batch_size: int, cache_dir: str | None = None, seed: int = 0, workers: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("data.block_size", block_size), ("data.batch_size", batch_size)):
            if value < 1:
                raise UserError(f"{name}={value} is not possible; give a positive number")
        at_least("data.workers", workers, 0)
        self.block_size, self.batch_size, self.seed, self.workers = block_size, batch_size, seed, workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else CACHE
        if not self.cache_dir.is_dir():  # one that is there may hold all that is needed, and be read-only
            refuse_unwritable("data.cache_dir", self.cache_dir)
        self.name = type(self).__name__  # what the report and the model card call the data
        self.tokenizer: Any = None
        self._windows: dict[str, Dataset] = {}

    @abstractmethod
    def rows(self, split: Split) -> Dataset:
        """The documents of one split, one per row, with a fingerprint that changes when the content does."""

    def encode(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Token ids and labels of a batch of rows; here the text and one end-of-text token, loss on everything."""
        ids = self.tokenizer(batch[self.text_column], add_special_tokens=False, verbose=False)["input_ids"]
        ids = [[*row, self.tokenizer.eos_token_id] for row in ids]
        return {"input_ids": ids, "labels": ids}

    def describe(self) -> dict[str, Any]:
        """What the report says about the data: name, windows and tokens of every split used so far."""
        used = {split: {"windows": len(w), "tokens": len(w) * self.block_size} for split, w in self._windows.items()}
        return {"name": self.name, "block_size": self.block_size, "splits": used}

    def reach(self) -> Fallback | None:
        """Find the data if it is elsewhere; the stand-in to use if it is out of reach. Quick. Raises UserError."""
        return None

    def attach(self, tokenizer: Any) -> None:
        """Set the tokenizer (a transformers tokenizer with an end-of-text token); forgets windows of another one."""
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token), which separates packed documents")
        self.tokenizer, self._windows = tokenizer, {}

    def windows(self, split: Split) -> Dataset:
        """All packed windows of a split as torch int64 columns `input_ids` and `labels`, [block_size] each.

        Raises UserError if the split has fewer tokens than one window.
        """
        if split not in self._windows:
            self._windows[split] = self._pack(split).with_format("torch")
        return self._windows[split]

    def evaluation(self, split: Split = "test", n_windows: int | None = None) -> Batch:
        """At most `n_windows` windows spread evenly over the split, always the same ones: [n, block_size]."""
        windows = self.windows(split)
        n = min(n_windows or len(windows), len(windows))
        batch = windows[np.linspace(0, len(windows) - 1, n).round().astype(int).tolist()]
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}

    def eval_ids(self, split: Split = "test", n_windows: int | None = None) -> torch.Tensor:
        """The token ids of `evaluation(...)`, int64 [n, block_size]: what every stage and runtime is scored on."""
        return self.evaluation(split, n_windows)["input_ids"]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless shuffled batches that start where the trainer's step says, so that a resumed run sees the same."""
        windows, position = self.windows("train"), 0
        if self.trainer is not None:
            position = self.trainer.global_step * self.trainer.accumulate_grad_batches
        sampler = StepSampler(len(windows), self.batch_size, self.seed, position)
        return DataLoader(windows, batch_sampler=sampler, num_workers=self.workers, generator=torch.Generator())  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split in order."""
        return DataLoader(self.windows("validation"), batch_size=self.batch_size, generator=torch.Generator())  # type: ignore[arg-type]

    def _pack(self, split: Split) -> Dataset:
        rows = self.rows(split)
        key = self._key(rows)
        path = self.cache_dir / "packed" / f"{key}.arrow"
        if not path.exists():
            with disk_errors(path):
                self._tokenize(rows, key, path)
        packed = Dataset.from_file(str(path))
        if not len(packed):
            raise UserError(
                f"the {split} split has fewer than data.block_size={self.block_size} tokens in {len(rows)} rows; "
                "give more text or a smaller data.block_size"
            )
        return packed

    def _tokenize(self, rows: Dataset, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent))
        disable_progress_bars()
        try:
            tokens = rows.map(
                self.encode,
                batched=True,
                num_proc=self.workers or None,
                remove_columns=rows.column_names,
                cache_file_name=str(scratch / "tokens.arrow"),
                new_fingerprint=key,
            )
            _write(scratch / "packed.arrow", _blocks(tokens, self.block_size), self.block_size)
            os.replace(scratch / "packed.arrow", path)
        finally:
            enable_progress_bars()
            shutil.rmtree(scratch, ignore_errors=True)

    def _key(self, rows: Dataset) -> str:
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else Hasher.hash(tokenizer)
        parts = [state, str(tokenizer.chat_template), str(tokenizer.eos_token_id), rows._fingerprint]
        parts += [type(self).__qualname__, self.text_column, str(self.block_size)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _blocks(tokens: Dataset, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) as int32 [k, size]: documents joined end to end and cut, the incomplete last window dropped."""
    held: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for batch in tokens.with_format("arrow").iter(batch_size=256):
        table = cast(pa.Table, batch)
        ids, labels = _flat(table["input_ids"]), _flat(table["labels"])
        held.append((ids, labels))
        count += len(ids)
        if count >= max(FLUSH, size):
            ids, labels = (np.concatenate(column) for column in zip(*held, strict=True))
            cut = count - count % size
            yield ids[:cut].reshape(-1, size), labels[:cut].reshape(-1, size)
            held, count = [(ids[cut:], labels[cut:])], count - cut
    if count >= size:
        ids, labels = (np.concatenate(column) for column in zip(*held, strict=True))
        cut = count - count % size
        yield ids[:cut].reshape(-1, size), labels[:cut].reshape(-1, size)


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int32)


def _write(path: Path, blocks: Iterator[tuple[np.ndarray, np.ndarray]], size: int) -> None:
    """An Arrow stream file that `Dataset.from_file` memory-maps."""
    kind = pa.list_(pa.int32(), size)
    schema = pa.schema([("input_ids", kind), ("labels", kind)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for pair in blocks:
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), size) for x in pair]
            table = pa.Table.from_arrays(columns, schema=schema)
            writer.write_table(table, max_chunksize=1024)
