"""What the disk refuses is an error of the user's, whichever library met it; anything else stays what it is."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qat.errors import UserError, at_least, disk_errors


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
