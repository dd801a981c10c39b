"""Malformed files: each is refused with its file, its line and what is wrong, or skipped and counted."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qat.data.readers import CHUNK, Bad, Row, find, read
from qat.data.store import store
from qat.errors import UserError


def kept(path: Path, tmp_path: Path, *, skip: bool = False, column: str = "text"):
    cache = tmp_path / "cache"
    return store(find(path, "data.path"), text_column=column, skip=skip, render=None, template="", cache_dir=cache)


def texts(path: Path, tmp_path: Path, **options) -> list[str]:
    return kept(path, tmp_path, **options).rows["text"][:]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


GOOD = json.dumps({"text": "fine"}).encode() + b"\n"
LINES = [
    (b'{"text": "x"\n', "invalid JSON: Expecting ',' delimiter at column 13"),
    (b'["text"]\n', "a JSON object is needed, here is a list"),
    (b'{"body": "x", "id": 1}\n', "no column 'text' (there are: 'body', 'id'; data.text_column names another)"),
    (b'{"text": 7}\n', "column 'text' must be text, here is a number"),
    (b'{"text": null}\n', "column 'text' must be text, here is null"),
    (b'{"text": ["x"]}\n', "column 'text' must be text, here is a list"),
    (b'{"text": "caf\xe9"}\n', "byte 0xE9 at offset 30 is not UTF-8 (if the file is Latin-1: iconv -f latin1"),
    (b'{"text": "x\0"}\n', "a NUL byte at offset 28"),
    (b'{"text": "x\\u0000"}\n', "a NUL character in the text"),
    (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000 + b"\n", "invalid JSON"),
]


@pytest.mark.parametrize(("line", "problem"), LINES, ids=[p[:30] for _, p in LINES])
def test_a_malformed_json_line_stops_with_its_place_or_is_skipped_and_counted(line, problem, tmp_path):
    file = write(tmp_path / "rows.jsonl", GOOD + line + GOOD)
    with pytest.raises(UserError) as error:
        kept(file, tmp_path)
    assert str(error.value).startswith(f"{file}, line 2: {problem}")
    assert "data.on_bad_row=skip" in str(error.value)
    stored = kept(file, tmp_path, skip=True)
    assert stored.rows["text"][:] == ["fine", "fine"]
    assert (stored.report["rows"], stored.report["bad_rows"]) == (2, 1)
    assert stored.report["first_bad_rows"][0].startswith(f"{file}, line 2: {problem}")


def test_when_every_row_is_malformed_skipping_is_an_error_too(tmp_path):
    file = write(tmp_path / "rows.jsonl", '{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"all 3 rows are malformed, first .*line 1: no column 'text'"):
        kept(file, tmp_path, skip=True)


def test_json_lines_survive_crlf_a_byte_order_mark_empty_lines_and_separators_inside_strings(tmp_path):
    rows = ["a\u2028b\x85c", "d\ne"]
    lines = b"\r\n\r\n".join(json.dumps({"text": t}, ensure_ascii=False).encode() for t in rows)
    assert texts(write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + lines), tmp_path) == rows


def test_a_json_array_is_refused_with_the_command_that_converts_it(tmp_path):
    with pytest.raises(UserError, match=r"is a JSON array; .* jq -c"):
        kept(write(tmp_path / "x.json", '[{"text": "x"}]'), tmp_path)


CSV = [
    ("text,id\na,1\nb\nc,3\n", "line 3: 1 fields, but the header has 2", ["a", "c"]),
    ('text,id\na,1\n"b"x,2\nc,3\n', "line 3: invalid CSV: ',' expected after '\"'", ["a", "c"]),
    ('text,id\na,1\n"b,2\nc,3\n', "lines 3 to 4: a quote that is never closed", ["a"]),
]


@pytest.mark.parametrize(("content", "problem", "rest"), CSV)
def test_a_malformed_csv_row(content, problem, rest, tmp_path):
    file = write(tmp_path / "rows.csv", content)
    with pytest.raises(UserError) as error:
        kept(file, tmp_path)
    assert str(error.value).startswith(f"{file}, {problem}")
    assert texts(file, tmp_path, skip=True) == rest


def test_csv_fields_may_span_lines_and_the_place_is_where_the_row_begins(tmp_path):
    content = b'id,text\r\n1,"a\r\nb ""q"", c"\r\n\r\n2,caf\xe9\r\n3,d\r\n'
    file = write(tmp_path / "x.csv", content)
    with pytest.raises(UserError, match=rf"line 5: byte 0xE9 at offset {content.index(0xE9)} is not UTF-8"):
        kept(file, tmp_path)
    assert texts(file, tmp_path, skip=True) == ['a\nb "q", c', "d"]


def test_a_missing_column_names_those_that_are_there(tmp_path):
    csv = write(tmp_path / "x.csv", "id;body\n1;x\n")
    with pytest.raises(UserError, match=r"has no column 'text' \(nor 'messages'\); it has 'id;body'"):
        kept(csv, tmp_path, skip=True)
    parquet = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), parquet)
    with pytest.raises(UserError, match=r"has no column 'text' .* it has 'id', 'body'"):
        kept(parquet, tmp_path)
    assert texts(parquet, tmp_path, column="body") == ["x"]


def test_parquet_columns_are_checked_and_nulls_are_malformed_rows(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), file)
    with pytest.raises(UserError, match="column 'text' is int64, not text"):
        kept(file, tmp_path)
    pq.write_table(pa.table({"text": pa.array(["a", None, "c"]).dictionary_encode()}), file)
    with pytest.raises(UserError, match="row 2: column 'text' must be text, here is null"):
        kept(file, tmp_path)
    assert texts(file, tmp_path, skip=True) == ["a", "c"]
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xff"]).buffers())
    pq.write_table(pa.table({"text": raw}), file)
    with pytest.raises(UserError, match="row 2: byte 0xFF is not UTF-8"):
        kept(file, tmp_path)


@pytest.mark.parametrize("cut", [0.5, 0.99])
def test_a_cut_parquet_file_and_one_that_is_none(cut, tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(n) for n in range(5000)]}), file)
    whole = file.read_bytes()
    with pytest.raises(UserError, match="not a complete parquet file"):
        kept(write(file, whole[: int(len(whole) * cut)]), tmp_path)


def test_a_damaged_page_of_a_parquet_file(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [f"row {n}" for n in range(5000)]}), file, compression="zstd", use_dictionary=False
    )
    data = bytearray(file.read_bytes())
    data[200:1200] = bytes(1000)
    with pytest.raises(UserError, match="is damaged after row 0"):
        kept(write(file, bytes(data)), tmp_path)


def test_text_files_that_are_not_utf8(tmp_path):
    with pytest.raises(UserError, match="is UTF-16, not UTF-8; convert it: iconv -f utf-16"):
        kept(write(tmp_path / "a.txt", "hello".encode("utf-16")), tmp_path)
    latin = write(tmp_path / "b.txt", "un\ndéux\ntrois\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"b\.txt, line 2: byte 0xE9 at offset 4 is not UTF-8"):
        kept(latin, tmp_path)
    assert texts(latin, tmp_path, skip=True) == ["un\ntrois\n"]
    with pytest.raises(UserError, match="line 1: a NUL byte at offset 1"):
        kept(write(tmp_path / "c.txt", "hello".encode("utf-16-le")), tmp_path)


@pytest.mark.parametrize("shape", ["lines", "paragraphs", "one line", "one line, no blank"])
def test_the_pieces_of_a_text_file_join_to_the_file(shape, tmp_path):
    word = "wörd€ 🦊 " if shape != "one line, no blank" else "é€🦊x"
    breaks = {"lines": "\n", "paragraphs": "\n\n"}.get(shape, "")
    content = breaks.join(word * 9 for _ in range(2000))
    rows = list(read(write(tmp_path / "x.txt", content), "text"))
    assert all(isinstance(row, Row) for row in rows)
    assert "".join(row.values["text"] for row in rows) == content
    assert [row.end for row in rows] == [False] * (len(rows) - 1) + [True]
    assert max(len(row.values["text"]) for row in rows) < 6 * CHUNK
    assert len(rows) > len(content) / (6 * CHUNK)


def test_folders_are_read_sorted_with_mixed_kinds_and_without_hidden_files(tmp_path):
    folder = tmp_path / "a b,=#(é)"
    (folder / "sub").mkdir(parents=True)
    write(folder / "b.jsonl", '{"text": "2"}\n')
    write(folder / "sub" / "c.csv", "text\n3\n")
    write(folder / "a.TXT", "1")
    write(folder / ".hidden.bin", "x")
    assert texts(folder, tmp_path) == ["1", "2", "3"]
    write(folder / "notes.docx", "x")
    with pytest.raises(UserError, match=r"notes\.docx: files of kind '\.docx' are not read; \.txt, \.jsonl, .*parquet"):
        find(folder, "data.path")


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.*nowhere\.txt: there is no such file or folder"):
        find(tmp_path / "nowhere.txt", "data.path")
    with pytest.raises(UserError, match="the folder holds no files"):
        find(tmp_path, "data.path")
    with pytest.raises(UserError, match=r"a\.csv is empty"):
        find(write(tmp_path / "a.csv", ""), "data.path")
    with pytest.raises(UserError, match="there is no text in it"):
        kept(write(tmp_path / "b.jsonl", "\n" + '{"text": ""}\n'), tmp_path)


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path, monkeypatch):
    file = write(tmp_path / "x.jsonl", GOOD * 3)
    first = kept(file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("qat.data.store.read", lambda *a: pytest.fail("read again"))
        file.touch()
        assert kept(file, tmp_path).key == first.key
    write(file, GOOD * 4)
    assert len(kept(file, tmp_path).rows) == 4


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(UserError):
        kept(write(tmp_path / "x.jsonl", GOOD + b"{\n"), tmp_path)
    assert list((tmp_path / "cache").rglob("*.arrow")) == []


def test_reading_streams(tmp_path):
    """The first rows come before the rest is parsed: a bad line at the end does not keep them back."""
    rows = read(write(tmp_path / "x.jsonl", GOOD * 1000 + b"{"), "text")
    assert next(rows) == Row("line 1", {"text": "fine"})
    assert next(r for r in rows if isinstance(r, Bad)).place == "line 1001"
