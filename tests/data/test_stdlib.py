"""The embedded corpus: what belongs to it, how it is split, and that it is the same every time."""

import sysconfig
from pathlib import Path

import pytest

from qat.data.stdlib import StdlibData, files, split_of


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    names = [f"package/m{i}.py" for i in range(60)]
    left_out = ["test/a.py", "package/tests/a.py", "idlelib/idle_test/a.py", "site-packages/a.py", "a.txt"]
    for name in [*names, *left_out, "package/__pycache__/a.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"x = {name!r}\n")
    return root


def test_tests_and_other_packages_are_left_out(library: Path) -> None:
    assert [name for name, _ in files(library)] == sorted(f"package/m{i}.py" for i in range(60))


def test_a_file_declares_its_own_encoding(library: Path) -> None:
    (library / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    assert dict(files(library))["latin.py"].endswith("x = 'é'\n")


def test_splits_partition_the_files(library: Path) -> None:
    data = StdlibData(root=str(library), block_size=8, batch_size=1)
    paths = {split: data.rows(split)["path"] for split in ("train", "validation", "test")}
    everything = [path for split in paths.values() for path in split]
    assert sorted(everything) == [name for name, _ in files(library)]
    assert all(split_of(path) == split for split, chosen in paths.items() for path in chosen)


def test_shares_are_90_5_5() -> None:
    names = [f"a/b{i}.py" for i in range(20000)]
    shares = {
        split: sum(split_of(name) == split for name in names) / 20000 for split in ("train", "validation", "test")
    }
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.006)


def test_hash_and_fingerprint_follow_the_content(library: Path) -> None:
    def seen() -> tuple[str, str]:
        data = StdlibData(root=str(library), block_size=8, batch_size=1)
        fingerprint = data.rows("train")._fingerprint
        return data.describe()["corpus_sha256"], fingerprint

    before = seen()
    assert seen() == before
    name = next(name for name, _ in files(library) if split_of(name) == "train")
    (library / name).write_text("y = 1\n")
    after = seen()
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_the_running_interpreters_library_is_the_default() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    assert StdlibData(block_size=8, batch_size=1).root == root
    assert StdlibData(block_size=8, batch_size=1).describe()["name"] == "stdlib"
    names = {name for name, _ in files(root)}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any("test" in name.split("/")[:-1] for name in names)
