"""Custom data end to end: files in, packed windows out; splits, caching, size limits, memory."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qat.data.custom import CustomData
from qat.data.split import split
from qat.errors import UserError

sys.path.append(str(Path(__file__).parents[1]))
from tiny_models import tiny_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(12)) + f" {n}" for n in range(count)]


def jsonl(path: Path, rows: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


def data(path: Path | str, tmp_path: Path, **options) -> CustomData:
    made = CustomData(
        **{"path": str(path), "block_size": 32, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
    )
    made.attach(tiny_tokenizer())
    return made


def ids(made: CustomData, name: str) -> list[int]:
    return made.windows(name)["input_ids"][:].flatten().tolist()


def test_windows_are_the_tokens_of_the_rows_each_with_an_end_of_text(tmp_path):
    made = data(jsonl(tmp_path / "x.jsonl", sentences(200)), tmp_path)
    tok = made.tokenizer
    for name in ("train", "validation", "test"):
        expected = [t for row in made.rows(name)["text"] for t in [*tok(row)["input_ids"], tok.eos_token_id]]
        assert ids(made, name) == expected[: len(expected) // 32 * 32]
        assert made.windows(name)["labels"][:].flatten().tolist() == ids(made, name)
    everything = [row for name in ("train", "validation", "test") for row in made.rows(name)["text"]]
    assert sorted(everything) == sorted(sentences(200))
    # The leftover of a split is less than a window and is dropped.
    assert made.describe()["name"] == made.path.rpartition("/")[2]
    assert made.describe()["read"]["train"] == {"rows": 200, "empty_rows": 0, "bad_rows": 0, "first_bad_rows": []}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_gives_the_same_windows_and_another_text_column_works(kind, tmp_path):
    rows = sentences(120)
    file = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(120), "body": rows}), file)
    elif kind == "csv":
        file.write_text("id,body\n" + "".join(f"{n},{row}\n" for n, row in enumerate(rows)))
    else:
        jsonl(file, rows, "body")
    reference = data(jsonl(tmp_path / "reference.jsonl", rows), tmp_path)
    made = data(file, tmp_path, text_column="body")
    for name in ("train", "validation", "test"):
        assert ids(made, name) == ids(reference, name)


def test_a_text_file_has_one_end_of_text(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("\n".join(sentences(2000)))
    made = data(file, tmp_path)
    end = made.tokenizer.eos_token_id
    rows = [row for n in ("train", "validation", "test") for row in made.encode(made.rows(n)[:])["input_ids"]]
    assert [row for part in rows for row in part].count(end) == 1
    assert len(rows) > 10


def test_workers_change_nothing(tmp_path):
    file = jsonl(tmp_path / "x.jsonl", sentences(300))
    alone = data(file, tmp_path / "a")
    several = data(file, tmp_path / "b", workers=2)
    assert ids(alone, "train") == ids(several, "train")


def test_the_split_is_by_hash_of_the_row(tmp_path):
    """95/2.5/2.5; adding rows or their order moves no row to another side, and equal rows are on the same side."""
    rows = sentences(4000)
    first = data(jsonl(tmp_path / "a.jsonl", rows), tmp_path)
    sizes = {name: len(first.rows(name)) / len(rows) for name in ("train", "validation", "test")}
    assert sizes["train"] == pytest.approx(0.95, abs=0.01)
    assert sizes["validation"] == pytest.approx(0.025, abs=0.008)
    more = rows[::-1] + sentences(500, seed=1) + rows[:1000]
    second = data(jsonl(tmp_path / "b.jsonl", more), tmp_path)
    for name in ("train", "validation", "test"):
        assert set(first.rows(name)["text"]) <= set(second.rows(name)["text"])
    assert not set(second.rows("train")["text"]) & set(second.rows("test")["text"])


def test_each_side_gets_a_window_however_few_the_rows():
    hashes = np.random.default_rng(0).integers(0, 2**64, 12, dtype=np.uint64)
    parts = split(hashes, lambda i: 10, 25)
    assert parts is not None
    assert {name: len(rows) for name, rows in parts.items()} == {"validation": 3, "test": 3, "train": 6}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(12))
    assert split(hashes[:8], lambda i: 10, 25) is None
    assert split(np.zeros(12, np.uint64), lambda i: 10, 25) is None
    assert split(np.zeros(12, np.uint64), lambda i: 10, 25, together=False) is not None


def test_a_file_of_one_repeated_row_still_trains_and_says_what_that_means(tmp_path):
    made = data(jsonl(tmp_path / "x.jsonl", ["the quick brown fox"] * 200), tmp_path)
    assert len(made.windows("validation")) >= 1
    assert "share some" in made.describe()["read"]["train"]["warning"]


def test_too_little_text_says_how_many_tokens_there_are_and_are_needed(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("the quick brown fox")
    tokens = len(tiny_tokenizer()("the quick brown fox")["input_ids"]) + 1
    with pytest.raises(UserError, match=rf"x\.txt holds {tokens} tokens, but 96 are needed .* data\.block_size=32"):
        data(file, tmp_path).windows("train")


def test_rows_that_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match=r"the 2 rows of .* cannot be divided .* give data\.validation_path"):
        data(jsonl(tmp_path / "x.jsonl", [" ".join(sentences(50)), " ".join(sentences(40))]), tmp_path).windows("train")


def test_a_validation_file(tmp_path):
    train, held = jsonl(tmp_path / "a.jsonl", sentences(50)), jsonl(tmp_path / "b.jsonl", sentences(40, seed=1))
    made = data(train, tmp_path, validation_path=str(held))
    assert made.rows("train")["text"][:] == sentences(50)
    assert made.rows("validation")["text"][:] == made.rows("test")["text"][:] == sentences(40, seed=1)
    short = jsonl(tmp_path / "c.jsonl", ["fox"])
    with pytest.raises(UserError, match=r"the validation split of .* holds .* but 32 are needed for one window"):
        data(train, tmp_path, validation_path=str(short)).windows("train")
    with pytest.raises(UserError, match=r"data\.validation_path=.*no such file"):
        data(train, tmp_path, validation_path=str(tmp_path / "nowhere")).reach()


def test_the_home_folder_and_odd_letters_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "ein Ordner, a=1 #(é)"
    folder.mkdir()
    jsonl(folder / "x (1),=#ü.jsonl", sentences(100))
    assert len(data("~/ein Ordner, a=1 #(é)", tmp_path).windows("train")) > 5


def test_a_change_of_content_options_or_template_is_noticed(tmp_path):
    file = jsonl(tmp_path / "x.jsonl", sentences(200))
    first = ids(data(file, tmp_path), "train")
    again = data(file, tmp_path)
    again.encode = lambda batch: pytest.fail("tokenized again")  # type: ignore[method-assign]
    again._count = lambda batch: 1000  # type: ignore[method-assign]
    assert len(again.rows("train")) > 0
    jsonl(file, sentences(200, seed=1))
    assert ids(data(file, tmp_path), "train") != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "data=custom needs data.path"),
        ({"on_bad_row": "ignore"}, "data.on_bad_row=ignore is not possible; choose error or skip"),
        ({"offline": "gpt2_mini"}, "data.offline=gpt2_mini is not possible; choose error or stdlib"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(UserError, match=message):
        CustomData(**{"path": "x", "block_size": 8, "batch_size": 1, **options})


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory the Linux way")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Reading, checking and storing 54 MB of rows fits into 48 MB of new memory; reading the file at once does not."""
    row = json.dumps({"text": " ".join(sentences(150))}) + "\n"
    file = tmp_path / "large.jsonl"
    with file.open("w") as handle:
        for n in range(6_000):
            handle.write(row.replace("the", f"t{n}", 1))
    code = f"""
import re, resource, sys
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from pathlib import Path
from qat.data.readers import find
from qat.data.store import store
held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + (48 << 20), -1))
if sys.argv[1] == "whole":
    Path({str(file)!r}).read_bytes()
stored = store(find(Path({str(file)!r}), "data.path"), text_column="text", skip=False, render=None, template="",
               cache_dir=Path({str(tmp_path / "cache")!r}))
print(len(stored.rows))
"""
    done = {
        how: subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120)
        for how in ("streaming", "whole")
    }
    assert file.stat().st_size > 50 << 20
    assert done["streaming"].stdout.strip() == "6000", done["streaming"].stderr
    assert "MemoryError" in done["whole"].stderr  # the limit does bite
