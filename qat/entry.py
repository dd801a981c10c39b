"""`qat train`: from the command line through Hydra to plain objects; maps what goes wrong to exit codes.

Recipes are files of `recipes/`, offered to Hydra as the group `recipe`. Nothing behind this file sees a DictConfig.
"""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import UserError, VerifyError

ROOT = Path(__file__).parent.parent
CONFIGS, RECIPES = ROOT / "configs", ROOT / "recipes"


def main(argv: list[str]) -> int:
    """Run a recipe; returns the exit code (0 done, 1 crash by traceback, 2 wrong input, 3 failed verification)."""
    for path in RECIPES.glob("*.yaml"):
        ConfigStore.instance().store(group="recipe", name=path.stem, node=OmegaConf.load(path), package="_global_")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own handler would exit with 1 and print a page
    sys.argv = ["train.py", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")(launch)()
    except InstantiationException as error:
        cause = error.__cause__
        print(f"error: {cause if isinstance(cause, UserError) else error}", file=sys.stderr)
        return 2
    except (HydraException, OmegaConfBaseException, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except VerifyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


def launch(composed: DictConfig) -> None:
    """One composed job."""
    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    config["recipe"] = HydraConfig.get().runtime.choices.recipe
    if config["run_dir"] is None:
        config["run_dir"] = str(Path("outputs") / config["recipe"] / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    execute(config)


def execute(config: dict[str, Any]) -> None:
    """Instantiate everything and run the pipeline in config["run_dir"]."""
    from qat.pipeline import run

    objects = instantiate(OmegaConf.create(config), _convert_="all")
    objects["run_dir"] = Path(config["run_dir"])
    objects["run_dir"].mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), objects["run_dir"] / "config.yaml")
    run(**objects)
