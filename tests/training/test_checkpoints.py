"""A damaged checkpoint is named before it is loaded, wherever the damage is."""

from pathlib import Path

import pytest
import torch

from qat.errors import UserError
from qat.training.checkpoints import refuse_damaged


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"weight": torch.rand(1000)}, path)
    refuse_damaged(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the weight, which is most of the file
    path.write_bytes({"cut": data[:-500], "flipped": data, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        refuse_damaged(path)
