"""The two failures a command reports without a traceback, and the exit code of each."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EEXIST)
DISK = (*WRITING, errno.EACCES, errno.EPERM, errno.ENOTDIR)
FULL = "No space left on device"
SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's words for a disk that is full


class UserError(Exception):
    """The user's input is wrong: the message names the thing and the remedy. Exit code 2."""

    exit_code = 2


class VerifyError(Exception):
    """A written file does not hold what was frozen, or its runtime disagrees. Exit code 3."""

    exit_code = 3


def at_least(name: str, value: float, least: float) -> None:
    """Raise UserError unless `value`, the setting `name`, is `least` or more; NaN is not."""
    if not value >= least:
        raise UserError(f"{name}={value} is not possible; give {least} or more")


@contextmanager
def name_errors() -> Iterator[None]:
    """A path that no file system can have is a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{str(error.filename)[:80]}… is no file or folder: its name is too long") from error


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """A full, read-only or forbidden disk is the user's to put right: a UserError that names the file.

    path: what is being written in here; a failing write, unlike a failing open, does not tell.
    """
    try:
        yield
    except UserError:  # named already
        raise
    except Exception as error:
        full = FULL in str(error) or SHORT.match(str(error))  # safetensors has an exception of its own for it
        if not full and not (isinstance(error, OSError) and error.errno in DISK):
            raise
        opened = getattr(error, "filename", None)  # of a copy that finds the disk full, it is the source
        where = (path if full else None) or opened or path or "to the disk"
        why = FULL if full else getattr(error, "strerror", None) or str(error)
        if not path and not full and getattr(error, "errno", None) not in WRITING:
            raise UserError(f"cannot open {where}: {why}; give another, or the permissions it needs") from error
        raise UserError(f"cannot write {where}: {why}; free some space there or write elsewhere") from error
