"""Writing so that nothing half-written ever looks complete: temporary sibling, flush, rename; and manifests."""

import errno
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat.errors import UserError, VerifyError, disk_errors, understood

MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"  # of a frozen folder, whose manifest has a digest of every tensor: no SHA-256 besides
OLD = ".old"
FAILED = ".failed"
HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def atomic_folder(path: Path, *, shared: bool = False) -> Generator[Path]:
    """Yield an empty temporary sibling of `path`; on success it replaces `path`, on any error it is removed.

    A link is followed, and what was there is deleted: `refuse_foreign` says whether it may be. shared: whoever writes
    `path` writes the same, so that what another process finished in the meantime stays.
    """
    with disk_errors(path):
        yield from _folder(Path(path).resolve(), shared)


def _folder(path: Path, shared: bool) -> Generator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in _stale(path):
        if stale.suffix == OLD and not path.exists():
            stale.rename(path)  # killed between its two renames: this is what was there
        else:
            shutil.rmtree(stale, ignore_errors=True)
    temp = _sibling(path)
    old = temp.with_suffix(OLD)
    temp.mkdir()
    try:
        yield temp
        flush_files(temp)
        if shared:
            _rename_unless_there(temp, path)
        else:
            _replace(temp, path, old)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)  # interrupted between the two renames
        for left in (temp, old):
            shutil.rmtree(left, ignore_errors=True)


def _replace(temp: Path, path: Path, old: Path) -> None:
    try:
        if path.exists():
            path.rename(old)
        temp.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
            raise
        said = f"{path} was written by another process in the same moment, and this one's is lost; run it again"
        raise UserError(said) from error


def flush_files(folder: Path) -> None:
    """Bring every file of a folder to the disk; returns when they are there."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)


def _rename_unless_there(temp: Path, path: Path) -> None:
    try:
        temp.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(temp)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace one file as a whole."""
    with atomic_file(path) as temp:
        temp.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield the name of a temporary sibling to write; on success it replaces `path`, on any error it is removed."""
    temp = _sibling(path)
    for stale in _stale(path):
        stale.unlink(missing_ok=True)
    with disk_errors(path):
        try:
            yield temp
            _flush(temp)
            temp.replace(path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise


def _sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{HOST}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


def _stale(path: Path) -> list[Path]:
    """The temporary siblings of `path` whose process, on this host, was killed: others may be writing theirs."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.{HOST}\.(\d+)\.[0-9a-f]{{8}}\.(?:partial|old)", re.DOTALL)
    found = ((ours.fullmatch(p.name), p) for ending in ("partial", "old") for p in path.parent.glob(f".*.{ending}"))
    return [p for match, p in found if match and not _lives(int(match[1]))]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's
    return True


def refuse_unwritable(name: str, folder: Path) -> None:
    """Raise UserError unless `folder`, or the nearest one above it that is there, takes a new file; leaves none."""
    place = folder
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{name}={folder} cannot be written: {place}: {error.strerror}; give another") from error


def refuse_foreign(path: Path) -> None:
    """Raise UserError if there is something at `path` that qat did not write, and that replacing it would delete."""
    try:
        path = path.resolve()
    except RuntimeError as error:
        raise UserError(f"{path} is a link that leads to itself; remove it or write elsewhere") from error
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file, and a folder would take its place; move it away or write elsewhere")
    try:
        listed: dict[str, Any] = json.loads((path / MANIFEST).read_text())["files"]
        ours: set[str] = {MANIFEST, *listed}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    foreign = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_symlink() or not f.is_dir())
    foreign = [name for name in foreign if name not in ours]
    if foreign:
        raise UserError(f"{path} holds {foreign[0]}, which qat did not write there; move it away or write elsewhere")


def set_aside(path: Path) -> Path:
    """Rename an export that failed verification so that nobody takes it for a good one; returns its new path."""
    names = (path.with_name(f"{path.name}{FAILED}{n or ''}") for n in itertools.count())
    return path.rename(next(p for p in names if not p.exists()))


def _flush(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _covered(manifest: dict[str, Any]) -> set[str]:
    return {TENSORS} if manifest.get("kind") == "frozen" else set()


def write_manifest(folder: Path, extra: dict[str, Any], hashed: Callable[[Path], str] = sha256) -> None:
    """Write manifest.json: `extra` and, under "files", the SHA-256 and size of every other file in the folder, but of a
    frozen folder's TENSORS the size alone. hashed: what has the SHA-256 of a file."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    entries: dict[str, dict[str, Any]] = {str(f.relative_to(folder)): {"bytes": f.stat().st_size} for f in files}
    for name in entries.keys() - _covered(extra):
        entries[name]["sha256"] = hashed(folder / name)
    (folder / MANIFEST).write_text(json.dumps({**extra, "files": entries}, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every file it lists checked; of a frozen folder's TENSORS the size alone.

    Raises VerifyError naming the first that is missing or differs.
    """
    with understood(folder / MANIFEST):
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
        digests = {n: str(entry["sha256"]) for n, entry in manifest["files"].items() if n not in _covered(manifest)}
        manifest |= {"kind": str(manifest["kind"]), "tensors": dict(manifest["tensors"])}
    if manifest["kind"] == "frozen":  # all that is in it is read
        found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
        for name in sorted(found - sizes.keys()):
            raise VerifyError(f"{folder / name} is not in the manifest")
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise VerifyError(f"{file} is listed in the manifest but missing")
        if name in digests and sha256(file) != digests[name]:
            raise VerifyError(f"{file} is not the file in the manifest: its SHA-256 differs")
        if file.stat().st_size != size:
            raise VerifyError(f"{file} is not the file in the manifest: it has {file.stat().st_size} bytes, not {size}")
    return manifest
