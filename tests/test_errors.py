"""What the disk refuses is an error of the user's, whichever library met it; anything else stays what it is."""

import errno
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from qat.errors import UserError, VerifyError, at_least, disk_errors, understood


def test_a_full_disk_is_named_with_its_file() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(UserError, match=r"cannot write what\.bin: No space left"), disk_errors(Path("what.bin")):
        full.write_text("x")
    with (
        pytest.raises(UserError, match=r"cannot write inner: No space left on device; free"),
        disk_errors(Path("outer")),
        disk_errors(Path("inner")),
    ):
        full.write_text("x")


def test_the_exception_of_safetensors_counts_too() -> None:
    with pytest.raises(UserError, match="No space left"), disk_errors():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), disk_errors():
        (tmp_path / "file" / "folder").mkdir()


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open /x: Permission denied"), disk_errors():
        raise OSError(errno.EACCES, "Permission denied", "/x")
    with pytest.raises(UserError, match="cannot write out: Permission denied"), disk_errors(Path("out")):
        raise OSError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("error", [OSError("34816 requested and 0 written"), OSError(errno.EFBIG, "File too large")])
def test_numpys_words_for_a_full_disk_and_a_file_beyond_the_limit(error: OSError) -> None:
    with pytest.raises(UserError, match="cannot write model: "), disk_errors(Path("model")):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="broken") as caught, disk_errors():
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_at_least(value: float) -> None:
    at_least("n", 1, 1)
    with pytest.raises(UserError, match="n="):
        at_least("n", value, 1)


OPENED = {  # what a system call said -> the message
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "cannot open /a/b: Permission denied"),
    "no folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "cannot open /a/b: Not a directory"),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/b"), "cannot open /a/b: Is a directory"),
    "a loop": (OSError(errno.ELOOP, "Too many levels", "/a/b"), "cannot open /a/b: Too many levels"),
    "too long": (
        OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
        "cannot open x{80}…: File name too long",
    ),
    "too large": (OSError(errno.EFBIG, "File too large"), "cannot write to the disk: File too large; free"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"), "cannot write /a/b: Disk quota exceeded; free"),
}


@pytest.mark.parametrize("name", OPENED)
def test_reading_is_not_called_writing(name: str) -> None:
    error, said = OPENED[name]
    with pytest.raises(UserError, match=said), disk_errors():
        raise error


def test_a_file_that_is_being_written_and_another_that_is_read_for_it() -> None:
    for at, said in (("/out/part", "cannot write /out/part"), ("/in/part", "cannot open /in/part")):
        with pytest.raises(UserError, match=said), disk_errors(Path("/out/folder")):
            raise PermissionError(errno.EACCES, "Permission denied", at)


def test_numpys_short_writes_have_no_number() -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(UserError, match=r"cannot write model\.gguf: .*requested and \d+ written; free"),
        disk_errors(Path("model.gguf")),
    ):
        np.zeros(99_999).tofile(full)


@pytest.mark.parametrize(
    "error", [KeyError("a"), AssertionError(), MemoryError("much"), RecursionError(), Exception("b")]
)
def test_what_a_reader_raises_is_the_files_fault(error: Exception) -> None:
    with pytest.raises(VerifyError, match=f"what is damaged: .*{type(error).__name__}"), understood("what"):
        raise error
    with pytest.raises(UserError, match="this"), understood("what"):
        raise UserError("this")
