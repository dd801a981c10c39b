"""The two failures a command reports without a traceback, and the exit code of each."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EEXIST)
CLOSED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# safetensors has an exception of its own, and numpy's tofile an OSError without a number
FULL_IN_WORDS = re.compile(r"No space left on device|Disk quota exceeded|File too large|requested and \d+ written")


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
def understood(what: object) -> Iterator[None]:
    """Whatever goes wrong in here, while `what` is read, is the fault of its bytes: a VerifyError of one line.

    Bytes that someone else wrote can make a reader raise anything, so that no list of exceptions would be whole.
    """
    try:
        yield
    except (UserError, VerifyError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in WRITING:  # a temporary file of the reader
            raise
        if isinstance(error, OSError) and error.strerror:
            raise VerifyError(f"{error.filename or what} cannot be read: {error.strerror}") from error
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise VerifyError(f"{what} is damaged: it cannot be decoded ({said})") from error


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """What a disk refuses is the user's to put right: a UserError that names the file and says what was tried.

    path: what is being written in here; a failing write, unlike a failing open, does not tell.
    """
    try:
        yield
    except UserError:  # named already
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        words = FULL_IN_WORDS.search(str(error))
        opened = getattr(error, "filename", None)  # of a copy that finds the disk full, it is the source
        if words or number in WRITING:
            why = getattr(error, "strerror", None) or (words and words[0])
            where = path or opened or "to the disk"
            raise UserError(f"cannot write {where}: {why}; free some space there or write elsewhere") from error
        if number not in CLOSED:
            raise
        where = str(opened or path)
        where = where if len(where) < 300 else f"{where[:80]}…"
        writing = path is not None and (opened is None or Path(opened).is_relative_to(path.parent))
        what = "write" if writing else "open"
        raise UserError(f"cannot {what} {where}: {getattr(error, 'strerror', None)}; give another path") from error
