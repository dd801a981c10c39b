"""Weights & Biases without an account: offline unless the user is logged in."""

import hashlib
import netrc
import os
from pathlib import Path

from pytorch_lightning.loggers import WandbLogger


def wandb_logger(*, project: str, run_dir: Path, arm: str) -> WandbLogger:
    """A logger that writes under RUN/wandb; the same run and arm continue the same curve when resumed."""
    run_dir.mkdir(parents=True, exist_ok=True)
    name = f"{run_dir.parent.name}/{run_dir.name}"
    identity = hashlib.sha256(f"{run_dir.resolve()}\0{arm}".encode()).hexdigest()[:12]
    return WandbLogger(
        project=project, save_dir=run_dir, name=f"{name} {arm}", id=identity, resume="allow", offline=not logged_in()
    )


def logged_in() -> bool:
    """Whether wandb would find a key: WANDB_API_KEY, or the host in the netrc file (NETRC or the home folder's)."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
