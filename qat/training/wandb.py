"""Weights & Biases without an account: offline unless the user is logged in."""

import hashlib
import netrc
import os
from pathlib import Path

import wandb
from pytorch_lightning.loggers import WandbLogger


def wandb_logger(*, project: str, run_dir: Path, arm: str) -> WandbLogger:
    """A logger under RUN/wandb: one wandb run for the whole job, metrics by arm; a resumed job continues it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if wandb.run is None:  # else that of an earlier arm; Lightning would give `init` a setting it warns about
        made = wandb.init(
            project=project,
            dir=run_dir,
            name=f"{run_dir.parent.name}/{run_dir.name}",
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12],
            resume="allow",
            mode=None if logged_in() else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )
        made.define_metric("trainer/global_step")
        made.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return WandbLogger(project=project, save_dir=run_dir, experiment=wandb.run, prefix=arm)


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
