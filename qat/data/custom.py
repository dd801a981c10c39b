"""Your own text or conversations: files, a folder of them, or a data set on the hub."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from qat import hub
from qat.data import chat, published
from qat.data.base import Split, TokenData
from qat.data.split import split
from qat.data.store import Stored, store
from qat.errors import UserError


class CustomData(TokenData):
    """Rows of `path`: .txt, .jsonl, .json (lines), .csv, .parquet, a folder of them, or a hub id.

    A row is the text of `text_column`, or else a conversation in `messages` ([{"role", "content"}, ...]), rendered by
    the tokenizer's chat template with loss on the assistant's turns only; `text_column=messages` prefers these.
    Plain rows end with an end-of-text token; a .txt file is one document. Rows are joined and cut into windows of
    `block_size` tokens, and the last incomplete window of each split is dropped.

    Splits: those that a hub data set declares; else `path` for training and `validation_path` for validation and
    test; else 95/2.5/2.5 by hash of the row, each at least one window.
    """

    ends_documents = True

    def __init__(
        self,
        *,
        path: str | None,
        validation_path: str | None = None,
        config: str | None = None,
        text_column: str = "text",
        on_bad_row: str = "error",
        offline: str = "error",
        explicit: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not path:
            raise UserError("data=custom needs data.path: a file, a folder or a hub id")
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"data.on_bad_row={on_bad_row} is not possible; choose error or skip")
        hub.check_offline(offline, [published.STAND_IN], "data")
        self.path, self.validation_path, self.config = path, validation_path, config
        self.column, self.skip = text_column, on_bad_row == "skip"
        self.offline, self.explicit = offline, explicit
        local = Path(path).expanduser()
        # not where a file lies: a published model card would tell it
        self.name = local.resolve().name if local.exists() else " ".join(filter(None, [path, config]))
        self._files: dict[str, list[Path]] = {}
        self._parts: dict[str, Dataset] = {}
        self._reports: dict[str, dict[str, Any]] = {}

    def reach(self) -> hub.Fallback | None:
        """Find the files, downloading them from the hub if need be; the stand-in if that is what `offline` says.

        Quick for what is on disk or out of reach, so that a run is refused before any other work. Raises UserError.
        """
        if self._files:
            return None
        try:
            files = _splits(self.path, self.config, "data.path")
            if self.validation_path:
                held = _splits(self.validation_path, self.config, "data.validation_path")
                files = {"train": files["train"], "validation": held.get("validation", held["train"])}
            self._files = files
        except hub.Unreachable as e:
            return hub.stand_in(self.path, offline=self.offline, explicit=self.explicit, reason=str(e), key="data")
        return None

    def attach(self, tokenizer: Any) -> None:
        """As in TokenData; rendered conversations and minimal splits depend on the tokenizer too."""
        super().attach(tokenizer)
        self._parts = {}

    def rows(self, split: Split) -> Dataset:
        """Columns text, end, spans, hash (see `store`)."""
        if not self._parts:
            self._parts = self._load()
        return self._parts[split]

    def encode(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Token ids; labels on everything in plain text, on the assistant's characters in conversations."""
        chats = any(spans is not None for spans in batch["spans"])
        made = self.tokenizer(
            batch["text"], add_special_tokens=False, return_offsets_mapping=chats, return_attention_mask=False
        )
        out: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for n, (ids, end, spans) in enumerate(zip(made["input_ids"], batch["end"], batch["spans"], strict=True)):
            if spans is None:
                ids = [*ids, self.tokenizer.eos_token_id] if end and self.ends_documents else ids
                labels = ids
            else:
                labels = chat.labels(ids, made["offset_mapping"][n], spans)
            out["input_ids"].append(ids)
            out["labels"].append(labels)
        return out

    def describe(self) -> dict[str, Any]:
        """Adds what was read and what was left out: rows, empty rows, malformed rows and the first few of these."""
        return {**super().describe(), "path": self.path, "read": self._reports}

    def _load(self) -> dict[str, Dataset]:
        if self.reach() is not None:
            raise UserError(f"{self.path} is out of reach; the run uses {published.STAND_IN} instead")
        stored = {name: self._store(files) for name, files in self._files.items()}
        self._reports = {name: part.report for name, part in stored.items()}
        held = stored.get("validation") or stored.get("test")
        if held is None:
            return self._by_hash(stored["train"])
        parts = {
            "train": stored["train"].rows,
            "validation": held.rows,
            "test": stored.get("test", held).rows,
        }
        for name, rows in parts.items():
            self._demand(rows, f"the {name} split of {self.path}", 1)
        return {name: _named(rows, stored.get(name, held).key) for name, rows in parts.items()}

    def _store(self, files: list[Path]) -> Stored:
        tokenizer = self.tokenizer
        template = f"{tokenizer.chat_template}{tokenizer.special_tokens_map}" if tokenizer is not None else ""

        def render(messages: list[dict[str, Any]]) -> tuple[str, chat.Spans]:
            return chat.renderer(tokenizer)(messages)

        return store(
            files,
            text_column=self.column,
            skip=self.skip,
            render=render if tokenizer is not None else None,
            template=template,
            cache_dir=self.cache_dir,
        )

    def _by_hash(self, stored: Stored) -> dict[str, Dataset]:
        rows = stored.rows
        # Without a tokenizer (one is being learned from the training rows) a side may stay small.
        least = self.block_size if self.tokenizer is not None else 0
        hashes = np.asarray(rows.data.column("hash"))

        def tokens(i: int) -> int:
            return self._count(rows[i : i + 1])

        parts = split(hashes, tokens, least)
        if parts is None and (parts := split(hashes, tokens, least, together=False)):
            self._reports["train"]["warning"] = "so few rows are distinct that training, validation and test share some"
        if parts is None:
            self._demand(rows, self.path, 3)
            raise UserError(
                f"the {len(rows)} rows of {self.path} cannot be divided into training, validation and test of "
                f"data.block_size={self.block_size} tokens each; give data.validation_path"
            )
        names = {name: hashlib.sha256(where.tobytes()).hexdigest()[:16] for name, where in parts.items()}
        return {name: rows.select(parts[name], new_fingerprint=stored.key + names[name]) for name in parts}

    def _count(self, batch: dict[str, list[Any]]) -> int:
        return sum(len(ids) for ids in self.encode(batch)["input_ids"])

    def _demand(self, rows: Dataset, what: str, windows: int) -> None:
        """Raise UserError unless the rows hold this many windows (unknown while there is no tokenizer)."""
        need, have = windows * self.block_size, 0
        if self.tokenizer is None:
            return
        for start in range(0, len(rows), 100):
            have += self._count(rows[start : start + 100])
            if have >= need:
                return
        each = "training, validation and test, one window each" if windows > 1 else "one window"
        raise UserError(
            f"{what} holds {have} tokens, but {need} are needed for {each} of data.block_size={self.block_size}; "
            "give more text or a smaller data.block_size"
        )


def _splits(path: str, config: str | None, key: str) -> dict[str, list[Path]]:
    """Files by split: {"train": ...} for what is on disk."""
    local = published.local(path, key)
    return published.fetch(path, config, key) if local is None else {"train": local}


def _named(rows: Dataset, fingerprint: str) -> Dataset:
    return rows.select(range(len(rows)), new_fingerprint=fingerprint)
