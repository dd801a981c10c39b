"""A data set on the hub: which of its files belong to which split, and their download."""

import fnmatch
import re
from pathlib import Path
from typing import Any

from qat import hub
from qat.data.readers import READERS, find
from qat.errors import UserError

STAND_IN = "stdlib"
SUFFIXES = tuple(READERS)
WORDS = {"test": "test|testing", "validation": "validation|valid|val|dev|eval", "train": "train|training"}


def local(path: str, key: str) -> list[Path] | None:
    """The files of a `path` on disk, None for a hub id. Raises UserError for what is neither, or cannot be read."""
    there = Path(path).expanduser()
    on_disk = there.exists() or not hub.is_id(path) or there.suffix.lower() in SUFFIXES
    return find(there, key) if on_disk else None


def fetch(repo: str, config: str | None, key: str) -> dict[str, list[Path]]:
    """Files by split ("train", and where declared "validation", "test") of one configuration of a hub data set.

    Raises hub.Unreachable and UserError (see hub.fetch), UserError also for a configuration or format it lacks.
    """
    cards: dict[str, Any] = {}

    def choose(names: list[str], card: dict[str, Any]) -> list[str]:
        cards.update(card)
        return [name for files in _splits(repo, names, card, config).values() for name in files]

    folder, wanted = hub.fetch(repo, "dataset", key, choose)
    splits = _splits(repo, wanted, cards, config)
    return {split: [file for name in names for file in find(folder / name, key)] for split, names in splits.items()}


def away(repo: str, config: str | None, key: str) -> str | None:
    """Why `fetch` would raise hub.Unreachable; None if it would not. Downloads nothing. Raises its UserErrors."""

    def choose(names: list[str], card: dict[str, Any]) -> list[str]:
        return [name for files in _splits(repo, names, card, config).values() for name in files]

    return hub.away(repo, "dataset", key, choose)


def _splits(repo: str, names: list[str], card: dict[str, Any], config: str | None) -> dict[str, list[str]]:
    """File names by split, as the card declares them (configs[].data_files), else by the words in the names."""
    configs = {c["config_name"]: c.get("data_files") for c in card.get("configs") or []}
    if config is None and len(configs) > 1 and "default" not in configs:
        raise UserError(f"{repo} has several configurations; choose data.config={'|'.join(configs)}")
    if config is not None and config not in configs:
        have = f"it has {', '.join(configs)}" if configs else "it has none"
        raise UserError(f"{repo} has no configuration '{config}'; {have}")
    declared = configs.get(config or ("default" if "default" in configs else next(iter(configs), "")))
    readable = sorted(name for name in names if name.lower().endswith(SUFFIXES))
    splits: dict[str, list[str]] = {}
    if declared:
        for entry in [declared] if isinstance(declared, str | dict) else declared:
            split, patterns = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                splits.setdefault(split, []).extend(n for n in readable if fnmatch.fnmatch(n, pattern))
    else:
        for name in readable:
            splits.setdefault(_word(name), []).append(name)
    if not splits or not all(splits.values()):
        raise UserError(f"{repo} lacks files of the kinds that are read: {', '.join(SUFFIXES)}")
    if "train" not in splits:
        if len(splits) > 1:
            raise UserError(f"{repo} has no split 'train' but {', '.join(splits)}; give the files with data.path")
        splits = {"train": next(iter(splits.values()))}
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _word(name: str) -> str:
    for split, words in WORDS.items():
        if re.search(rf"(^|[^a-z])({words})([^a-z]|$)", name.lower()):
            return split
    return "train"
