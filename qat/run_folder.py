"""The run folder: made once nothing can be refused any more, with the configuration that would run it again."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from qat.errors import UserError
from qat.files import atomic_write, refuse_unwritable

CONFIG = "config.yaml"
OUTPUTS = Path("outputs")


def default(name: str) -> Path:
    """outputs/NAME/TIMESTAMP, with a number behind it should two runs start within a second."""
    stem = OUTPUTS / name / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}_{number}")
    return path


def refuse_used(path: Path) -> None:
    """Raise UserError if a run has already left checkpoints or a report in `path`, or if it can't be a folder."""
    refuse_unwritable("run_dir", path)
    if (path / "report.json").exists() or any((path / "checkpoints").rglob("*.ckpt")):
        raise UserError(f"run_dir={path} already holds a run; continue it with resume={path}, or give another run_dir")


def create(path: Path, config: dict[str, Any]) -> None:
    """Make the folder, write config.yaml, and for a folder of outputs/NAME/ point NAME/latest at it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        atomic_write(path / CONFIG, OmegaConf.to_yaml(OmegaConf.create({**config, "run_dir": str(path)})))
    except OSError as error:
        raise UserError(f"run_dir={path} cannot be written ({error.strerror}); give another run_dir") from error
    if path.parent.parent == OUTPUTS:
        link = path.parent / f".latest.{os.getpid()}"
        link.symlink_to(path.name)
        link.replace(path.parent / "latest")


def read(path: Path) -> dict[str, Any]:
    """The configuration of a run folder. Raises UserError if there is none."""
    if not (path / CONFIG).is_file():
        raise UserError(f"resume={path} is no run folder: it has no {CONFIG}")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path / CONFIG))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path / CONFIG} cannot be read, so this run cannot be resumed: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path / CONFIG} holds no configuration, so this run cannot be resumed")
    return {str(key): value for key, value in config.items()}
