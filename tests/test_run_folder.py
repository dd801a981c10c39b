"""A configuration that cannot be read stops a resume with a message that names it."""

from pathlib import Path

import pytest

from qat import run_folder
from qat.errors import UserError


@pytest.mark.parametrize("content", [b"a: [1\n", b"\xff\xfe\x00", b"- 1\n"])
def test_a_torn_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / run_folder.CONFIG).write_bytes(content)
    with pytest.raises(UserError, match="cannot be resumed"):
        run_folder.read(tmp_path)
