"""The embedded corpus: source text of the running interpreter's standard library, without its tests."""

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from qat.data.base import Split, TokenData

EVALUATION = Path(__file__).parents[1] / "assets" / "evaluation.jsonl"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class StdlibData(TokenData):
    """Python files, one row each ({"path", "text"}), split 90/5/5 by a hash of the path relative to the library.

    The test split is the embedded evaluation text, a fixed part of it, so that figures reproduce under any Python
    version; with a `root` of your own it is that folder's own test split.
    """

    def __init__(self, *, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.embedded = root is None
        self.root = Path(root).expanduser() if root else Path(sysconfig.get_path("stdlib"))
        self.name = "stdlib" if self.embedded else self.root.resolve().name
        self.corpus_hash = ""

    def rows(self, split: Split) -> Dataset:
        """Documents of one split, sorted by path."""
        found = list(files(self.root))
        digest = hashlib.sha256()
        for name, text in found:
            digest.update(f"{name}\0{text}\0".encode())
        self.corpus_hash = digest.hexdigest()
        if split == "test" and self.embedded:
            return Dataset.from_list([json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()])
        chosen = [(name, text) for name, text in found if split_of(name) == split]
        return Dataset.from_dict({"path": [name for name, _ in chosen], "text": [text for _, text in chosen]})

    def describe(self) -> dict[str, Any]:
        """Adds the hash over names and texts of the whole corpus, which tells one Python release from another."""
        return {**super().describe(), "corpus_sha256": self.corpus_hash}


def files(root: Path) -> Iterator[tuple[str, str]]:
    """(relative POSIX path, text) of each library module under `root`, sorted by path, decoded as Python does."""
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if LEFT_OUT.isdisjoint(relative.parts):
            with tokenize.open(path) as handle:
                yield relative.as_posix(), handle.read()


def split_of(name: str) -> Split:
    """Split of a relative path: one in twenty is test, one in twenty validation."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 20
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
