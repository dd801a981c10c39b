"""Validated rows as one memory-mapped Arrow file, written once per content of the sources."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from qat.data.chat import Refused, Render, check
from qat.data.readers import MESSAGES, Bad, Row, kind_of, read
from qat.errors import UserError
from qat.files import atomic_folder, sha256

FORMAT = "1"  # part of the key: change it when the meaning of a stored row changes
SHOWN = 5  # malformed rows that a report quotes
SCHEMA = pa.schema([("text", pa.string()), ("end", pa.bool_()), ("spans", pa.list_(pa.int32())), ("hash", pa.uint64())])


class Stored(NamedTuple):
    """`rows` has text, end (a document ends here), spans (characters with loss; null = all) and hash; see `report`."""

    rows: Dataset
    report: dict[str, Any]
    key: str


def store(
    files: list[Path], *, text_column: str, skip: bool, render: Render | None, template: str, cache_dir: Path
) -> Stored:
    """Read, check and write all rows of these files; unchanged files (by SHA-256) are not read again.

    `render` turns conversations into text (None: there is no tokenizer yet); `template` is its part of the key.
    A malformed row raises UserError, or with `skip` is left out, counted and quoted in the report
    {"rows", "empty_rows", "bad_rows", "first_bad_rows"}.
    """
    digest = hashlib.sha256("\0".join([FORMAT, text_column, str(skip), template]).encode())
    for file in files:
        digest.update(f"\0{file.name}\0{sha256(file)}".encode())
    key = digest.hexdigest()[:32]
    folder = cache_dir / "rows" / key
    if not folder.exists():
        with atomic_folder(folder, shared=True) as scratch:  # another run may prepare the same
            report = _write(scratch / "rows.arrow", files, text_column, skip, render)
            (scratch / "report.json").write_text(json.dumps(report))
    report = json.loads((folder / "report.json").read_text())
    return Stored(Dataset.from_file(str(folder / "rows.arrow")), report, key)


def _write(path: Path, files: list[Path], text_column: str, skip: bool, render: Render | None) -> dict[str, Any]:
    good = empty = bad = 0
    quoted: list[str] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        batch: list[dict[str, Any]] = []
        size = 0
        for file, row in _all(files, text_column):
            made = row if isinstance(row, Bad) else _checked(row, text_column, render)
            if isinstance(made, Bad):
                message = f"{file}, {made.place}: {made.problem}"
                if not skip:
                    raise UserError(f"{message}; mend it, or leave such rows out with data.on_bad_row=skip")
                bad += 1
                quoted += [message] if bad <= SHOWN else []
            elif not made["text"]:
                empty += 1
            else:
                batch.append(made)
                good, size = good + 1, size + len(made["text"])
                if len(batch) >= 1000 or size >= 1 << 24:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                    batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    if not good:
        why = f"all {bad} rows are malformed, first {quoted[0]}" if bad else "there is no text in it"
        raise UserError(f"{_names(files)}: {why}")
    return {"rows": good, "empty_rows": empty, "bad_rows": bad, "first_bad_rows": quoted}


def _all(files: Iterable[Path], text_column: str) -> Iterator[tuple[Path, Row | Bad]]:
    for file in files:
        for row in read(file, text_column):
            yield file, row


def _checked(row: Row, text_column: str, render: Render | None) -> dict[str, Any] | Bad:
    """The row as it is stored, or what is wrong with it."""
    spans = None
    if text_column in row.values and text_column != MESSAGES:
        text = row.values[text_column]
        if not isinstance(text, str):
            return Bad(row.place, f"column '{text_column}' must be text, here is {kind_of(text)}")
    elif MESSAGES in row.values:
        if render is None:
            raise UserError("conversations need a tokenizer with a chat template; this model learns its own from text")
        try:
            text, spans = render(check(row.values[MESSAGES]))
        except Refused as e:
            return Bad(row.place, str(e))
    else:
        there = ", ".join(map(repr, row.values)) or "none"
        return Bad(row.place, f"no column '{text_column}' (there are: {there}; data.text_column names another)")
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return Bad(row.place, "half of a surrogate pair, which no UTF-8 text can hold")
    if b"\0" in raw:
        return Bad(row.place, "a NUL character in the text")
    number = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
    return {"text": text, "end": row.end, "spans": spans, "hash": number}


def _names(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
