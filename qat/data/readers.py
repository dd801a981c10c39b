"""Rows of .txt, .jsonl, .json (lines), .csv and .parquet files, with the place and the reason of every malformed one.

Own code, because the readers of `datasets` can neither skip a malformed row nor tell its line, and read a column of
mixed types as nulls. Everything streams: memory holds one row (or one parquet batch) at a time.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qat.errors import UserError

CHUNK = 4096  # characters: a .txt file is cut at the first empty line after as many, or the first line after twice
FIELD = 1 << 26  # characters of a CSV field
MESSAGES = "messages"


@dataclass(frozen=True, slots=True)
class Row:
    """`values` has the text column, or "messages"; `end` says whether a document ends here; `place` is "line 7"."""

    place: str
    values: dict[str, Any]
    end: bool = True


@dataclass(frozen=True, slots=True)
class Bad:
    """A malformed row: where, and what is wrong with it."""

    place: str
    problem: str


Rows = Iterator[Row | Bad]


def find(path: Path, key: str) -> list[Path]:
    """The files to read under `path`: itself, or all in that folder (sorted, hidden ones left out).

    Raises UserError for a missing path, an empty folder, an empty file and a suffix that is not read.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f.relative_to(path)))
        if not files:
            raise UserError(f"{key}={path}: the folder holds no files; {_kinds()} are read")
    else:
        raise UserError(f"{key}={path}: there is no such file or folder")
    for file in files:
        if file.suffix.lower() not in READERS:
            raise UserError(f"{file}: files of kind '{file.suffix}' are not read; {_kinds()} are")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; remove it or give another {key}")
    return files


def read(file: Path, text_column: str) -> Rows:
    """All rows of one file. Raises UserError for what is wrong with the file as a whole."""
    return READERS[file.suffix.lower()](file, text_column)


def text(file: Path, text_column: str) -> Rows:
    """Pieces of CHUNK characters and more, which joined give the file; lines that are not text are `Bad`."""
    held: list[str] = []
    size, since = 0, 1
    for number, line in _lines(file, 4 * CHUNK):
        if isinstance(line, Bad):
            yield line
            continue
        if size >= 2 * CHUNK or (size >= CHUNK and not held[-1].strip()):
            yield Row(f"line {since}", {text_column: "".join(held)}, end=False)
            held, size, since = [], 0, number
        held.append(line)
        size += len(line)
    yield Row(f"line {since}", {text_column: "".join(held)})


def jsonl(file: Path, text_column: str) -> Rows:
    """One JSON object per line; empty lines are nothing."""
    for number, line in _lines(file):
        if isinstance(line, Bad):
            yield line
        elif line.strip():
            if number == 1 and file.suffix.lower() == ".json" and line.lstrip().startswith("["):
                raise UserError(f"{file} is a JSON array; one object per line is read: jq -c '.[]' FILE > NEW.jsonl")
            yield _object(f"line {number}", line)


def table(file: Path, text_column: str) -> Rows:
    """Comma-separated values with a header line; a quoted field may span lines."""
    csv.field_size_limit(FIELD)
    wrong: dict[int, str] = {}
    reader = csv.reader(_decoded(file, wrong), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as e:
        wrong[1] = f"invalid CSV: {e}"
        header = []
    if 1 in wrong:
        raise UserError(f"{file}, line 1: the header cannot be read: {wrong[1]}")
    column = _pick(file, header, text_column)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            last = reader.line_num
            place = f"line {start}" if last <= start else f"lines {start} to {last}"
            why = "a quote that is never closed" if "unexpected end" in str(e) else f"invalid CSV: {e}"
            yield Bad(place, why)
            continue
        place = f"line {start}"
        if bad := next((wrong[n] for n in range(start, reader.line_num + 1) if n in wrong), None):
            yield Bad(place, bad)
        elif not fields:
            continue
        elif len(fields) != len(header):
            yield Bad(place, f"{len(fields)} fields, but the header has {len(header)}")
        else:
            field: Any = fields[header.index(column)]
            value = _json(place, field) if column == MESSAGES else field
            yield value if isinstance(value, Bad) else Row(place, {column: value})


def parquet(file: Path, text_column: str) -> Rows:
    """Rows of a parquet file, read in batches of one column."""
    try:
        source = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file} is not a complete parquet file ({str(e).splitlines()[0]})") from e
    with source:
        column = _pick(file, source.schema_arrow.names, text_column)
        kind = source.schema_arrow.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if column != MESSAGES and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{file}: column '{column}' is {kind}, not text")
        number = 0
        try:
            for batch in source.iter_batches(batch_size=256, columns=[column]):
                for scalar in batch.column(0):
                    number += 1
                    try:
                        yield Row(f"row {number}", {column: scalar.as_py()})
                    except UnicodeDecodeError as e:
                        yield Bad(f"row {number}", f"byte 0x{e.object[e.start]:02X} is not UTF-8")
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{file} is damaged after row {number} ({str(e).splitlines()[0]})") from e


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": text,
    ".jsonl": jsonl,
    ".json": jsonl,
    ".csv": table,
    ".parquet": parquet,
}


def _kinds() -> str:
    return ", ".join(READERS)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _pick(file: Path, names: list[str], text_column: str) -> str:
    """The column to read: the text column, else "messages"."""
    for name in (text_column, MESSAGES):
        if names.count(name) == 1:
            return name
        if names.count(name) > 1:
            raise UserError(f"{file}: the column '{name}' appears {names.count(name)} times")
    raise UserError(
        f"{file} has no column '{text_column}' (nor '{MESSAGES}'); it has {', '.join(map(repr, names)) or 'none'}: "
        "name one with data.text_column"
    )


def _object(place: str, line: str) -> Row | Bad:
    value = _json(place, line)
    if isinstance(value, Bad):
        return value
    if not isinstance(value, dict):
        return Bad(place, f"a JSON object is needed, here is {kind_of(value)}")
    return Row(place, value)


def _json(place: str, line: str) -> Any:
    try:
        return json.loads(line.rstrip("\n"))
    except json.JSONDecodeError as e:
        return Bad(place, f"invalid JSON: {e.msg} at column {e.colno}")
    except (ValueError, RecursionError) as e:
        return Bad(place, f"invalid JSON: {e}")


def kind_of(value: object) -> str:
    """How a message calls a JSON value that is of the wrong kind."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _lines(file: Path, limit: int = -1) -> Iterator[tuple[int, str | Bad]]:
    """(number, line with its newline as "\\n") of a UTF-8 file; a longer line than `limit` bytes comes in pieces."""
    offset, number = 0, 1
    with file.open("rb") as handle:
        start = handle.peek(4)[:4]
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{file} is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8 FILE > NEW")
        if start.startswith(b"\xef\xbb\xbf"):
            offset = len(handle.read(3))
        while line := handle.readline(limit):
            # A piece of a long line must not end inside a character.
            while (
                not line.endswith(b"\n") and 0x80 <= (handle.peek(1)[:1] or b"\0")[0] < 0xC0 and len(line) < limit + 4
            ):
                line += handle.read(1)
            yield number, _decode(line, number, offset)
            offset += len(line)
            number += line.endswith(b"\n")


def _decode(line: bytes, number: int, offset: int) -> str | Bad:
    place = f"line {number}"
    if b"\0" in line:
        where = offset + line.index(b"\0")
        return Bad(place, f"a NUL byte at offset {where} (a binary file, or UTF-16 without its mark?)")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as e:
        return Bad(
            place,
            f"byte 0x{line[e.start]:02X} at offset {offset + e.start} is not UTF-8 "
            "(if the file is Latin-1: iconv -f latin1 -t utf-8 FILE > NEW)",
        )
    return decoded[:-2] + "\n" if decoded.endswith("\r\n") else decoded


def _decoded(file: Path, wrong: dict[int, str]) -> Iterator[str]:
    """Lines for the CSV reader, which must see each one to keep count: a bad one is empty and noted in `wrong`."""
    for number, line in _lines(file):
        if isinstance(line, Bad):
            wrong[number] = line.problem
            yield "\n"
        else:
            yield line
