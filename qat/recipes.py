"""The recipes: found in recipes/, offered to Hydra as the group `recipe`, listed for the user."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CONFIGS, RECIPES = ROOT / "configs", ROOT / "recipes"


class Recipe(NamedTuple):
    """What the head comment of a recipe file says: its first line, and a line `time: …, hardware: …`."""

    name: str
    about: str
    time: str
    hardware: str


def recipes(folder: Path = RECIPES) -> list[Recipe]:
    """All recipes by name."""
    return [read(path) for path in sorted(folder.glob("*.yaml"))]


def read(path: Path) -> Recipe:
    """The head comment of one recipe file."""
    head = [line.lstrip("# ").rstrip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    found = dict(re.findall(r"\b(time|hardware): (.*?)(?=[,;] \w+:|\n|$)", "\n".join(head)))
    return Recipe(path.stem, head[0] if head else "", found.get("time", ""), found.get("hardware", ""))


def listing() -> str:
    """All recipes as text, one paragraph each: what it does, how long it takes, on what."""
    lines = [f"  {r.name:<20} {r.about}\n{'':23}{r.time}, {r.hardware}" for r in recipes()]
    return "recipes (python train.py recipe=NAME [group=option …] [key=value …]):\n" + "\n".join(lines)


def register() -> None:
    """Make each file of recipes/ the option of the same name of Hydra's group `recipe`, merged at the top level."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for path in RECIPES.glob("*.yaml"):
        ConfigStore.instance().store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")
