"""A damaged checkpoint is named before it is loaded, wherever the damage is; a full disk leaves the one before."""

import errno
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny_training import gpt2, train

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


def test_a_full_disk_names_the_checkpoint_and_keeps_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = pl.Trainer.save_checkpoint

    def until_full(trainer: pl.Trainer, path: Path, **options: Any) -> None:
        save(trainer, path, **options)
        if trainer.global_step == 6:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", until_full)
    with pytest.raises(UserError, match=r"cannot write .*checkpoints/last\.ckpt: No space left"):
        train(gpt2(), tmp_path)
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt"}
    refuse_damaged(folder / "last.ckpt")
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 4
