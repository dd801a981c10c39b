"""`qat train`: from the command line through Hydra to plain objects, and from what goes wrong to exit codes.

Nothing behind this file sees a DictConfig. Heavy imports wait until the command line has been understood.
"""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat import overrides, recipes, run_folder
from qat.errors import UserError, VerifyError, disk_errors
from qat.files import refuse_unwritable
from qat.settings import check, suggestion


def main(argv: list[str]) -> int:
    """Run a recipe; returns the exit code: 0 done and verified, 2 wrong input, 3 a written file failed verification.

    Anything else is a bug and leaves by its traceback (exit code 1).
    """
    try:
        with disk_errors():
            train(argv)
    except (UserError, VerifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; continue with resume=RUN_DIR", file=sys.stderr)
        return 130
    return 0


def train(argv: list[str]) -> None:
    """Resume, or compose and run; raises UserError for whatever the user can put right."""
    flags = [argument for argument in argv if argument.startswith("-")]
    resumed = overrides.resumed(argv)
    if resumed is not None:
        folder, max_steps = resumed
        if folder.is_symlink():  # outputs/NAME/latest, which must not come to point at itself
            folder = folder.parent / folder.readlink()
        config: dict[str, Any] = {**run_folder.read(folder), "run_dir": str(folder)}
        refuse_incomplete(config)
        if max_steps is not None:
            config["trainer"]["max_steps"] = max_steps
        execute(config)
        return
    if not flags and not any(overrides.split(argument)[0] == "recipe" for argument in argv):
        raise UserError(f"name a recipe\n\n{recipes.listing()}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing a page and exiting with 1
    failures: list[UserError | VerifyError] = []
    quoted = list(map(overrides.quote, argv))

    def job(composed: DictConfig) -> None:
        try:  # Hydra would print a line of its own for what it sees failing
            launch(composed)
        except OmegaConfBaseException as error:
            failures.append(of_its_job(UserError(explain(error)), quoted))
        except (UserError, VerifyError) as error:
            failures.append(of_its_job(error, quoted))

    script, sys.argv = sys.argv, [sys.argv[0], *quoted]
    try:
        recipes.register()
        hydra.main(version_base="1.3", config_path=str(recipes.CONFIGS), config_name="train")(job)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):  # Hydra's, for GROUP=null
            raise
        nulls = " or ".join(a for a in argv if str(overrides.split(a)[1]).lower() == "null")
        raise UserError(f"{nulls} names nothing: give one of the group's names, or leave it out") from error
    finally:
        sys.argv = script
    if failures:
        worst = max(failures, key=lambda failure: failure.exit_code)
        raise type(worst)("\n".join(map(str, failures))) from worst


def of_its_job(error: UserError | VerifyError, quoted: list[str]) -> UserError | VerifyError:
    """With --multirun: the error, with the overrides that set its job apart from the others."""
    chosen = HydraConfig.get()
    if chosen.mode is not RunMode.MULTIRUN:
        return error
    own = " ".join(override for override in chosen.overrides.task if override not in quoted)
    return type(error)(f"job {chosen.job.num} ({own}): {error}")


@disk_errors()
def launch(composed: DictConfig) -> None:
    """One composed job (several with --multirun)."""
    config: dict[str, Any] = OmegaConf.to_container(composed, resolve=True)  # type: ignore[assignment]
    refuse_incomplete(config)
    chosen = HydraConfig.get()
    config["recipe"] = chosen.runtime.choices["recipe"]
    config["target"] = chosen.runtime.choices.get("target")
    if isinstance(config["export"], str):
        config["export"] = [name for name in config["export"].replace("+", ",").split(",") if name]
    if config["target"] is not None:
        refuse_contradiction(config["target"], chosen.runtime.choices["scheme"], config["export"])
    given = {overrides.split(override)[0] for override in chosen.overrides.task}
    for name in ("model", "data"):  # a stand-in never replaces what the user named
        if "explicit" in config[name]:
            config[name]["explicit"] = f"{name}.path" in given
    if config["run_dir"] is not None and chosen.mode is RunMode.MULTIRUN:
        raise UserError("run_dir is one folder, and --multirun needs one for each job: leave it out")
    if config["run_dir"] is not None:
        run_folder.refuse_used(Path(config["run_dir"]))
    else:
        refuse_unwritable("run_dir", run_folder.OUTPUTS.absolute())
    execute(config)


def refuse_incomplete(config: dict[str, Any]) -> None:
    """Raise UserError if a part that is read before `settings.check` is gone (`~data`), or is no mapping."""
    for name, key in (("model", "_target_"), ("data", "_target_"), ("trainer", "_target_"), ("scheme", "rules")):
        part = config.get(name)
        if not isinstance(part, dict) or key not in part:
            raise UserError(f"a run needs {name}, a mapping with {key}: choose one with {name}=NAME")
    if "export" not in config:
        raise UserError("the configuration lacks export")


def refuse_contradiction(target: str, scheme: str | None, export: list[str]) -> None:
    """Raise UserError unless the run has the scheme that its target sets and exports no more than the target does."""
    sets = OmegaConf.load(recipes.CONFIGS / "target" / f"{target}.yaml")
    wanted = next(entry["override /scheme"] for entry in sets.defaults if "override /scheme" in entry)
    beyond = [name for name in export if name not in sets.export]
    if scheme != wanted:
        raise UserError(f"scheme={scheme} contradicts target={target}, which sets scheme={wanted}; give target=null")
    if beyond:
        known = ", ".join(sets.export)
        raise UserError(f"export={beyond[0]} contradicts target={target}, which exports {known}; give target=null")


def execute(config: dict[str, Any]) -> None:
    """Check, build and run one configuration."""
    from qat.reach import refuse_missing

    refuse_missing(config)  # before the imports below, which take seconds
    from hydra.utils import instantiate

    from qat.pipeline import run

    run_dir = None if config["run_dir"] is None else Path(config["run_dir"])
    check({**config, "config": config, "run_dir": run_dir}, run)
    try:
        objects = instantiate(OmegaConf.create(config), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ValueError):  # a grid or a rule that has no meaning
            where = str(error).rpartition("full_key: ")[2]
            raise UserError(f"{where}: {error.__cause__}") from None
        raise
    run(**objects | {"run_dir": run_dir, "config": config})


def explain(error: Exception) -> str:
    """One sentence for what Hydra or OmegaConf refused."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "recipe":
            return f"there is no recipe {name}\n\n{recipes.listing()}"
        if error.options:
            return f"there is no {group}={name}; choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: a value with special characters needs quotes for Hydra too"
    if isinstance(error, ConfigCompositionException) and "Could not override '" in str(error):
        key = str(error).split("'")[1]
        return f"there is no key {key}; {suggestion(key, known_keys())}"
    return " ".join(str(error).split("\nfull_key:")[0].split())


def known_keys() -> list[str]:
    """Every key and group of the default configuration, in dotted form."""
    with hydra.initialize_config_dir(str(recipes.CONFIGS), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("train"))
    return [*_dotted(composed, ""), "recipe"]


def _dotted(node: Any, path: str) -> list[str]:
    keys: list[str] = []
    for key, value in node.items() if isinstance(node, dict) else ():
        where = f"{path}.{key}" if path else str(key)
        keys += [where, *_dotted(value, where)]
    return [key for key in keys if not key.rpartition(".")[2].startswith("_")]
