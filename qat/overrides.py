"""The command line before Hydra reads it: paths are the user's business, so they are quoted for Hydra's grammar."""

from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from qat.errors import UserError

PATHS = ("run_dir", "resume", "data.path", "model.path")
MAY_CHANGE = ("trainer.max_steps",)


def split(argument: str) -> tuple[str, str | None]:
    """`key=value` as (key without Hydra's + and ~ marks, value); (argument, None) if it is no override."""
    key, equals, value = argument.partition("=")
    return key.lstrip("+~"), value if equals else None


def path_value(value: str) -> str:
    """The path that the user means: matching quotes around it dropped, `~` expanded."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return str(Path(value).expanduser()) if value.startswith("~") else value


def quote(argument: str) -> str:
    """Quote the value of a path key, so that spaces, commas, `=`, `#`, `(`, `$` and the like reach us unread.

    `target=null` becomes the deletion of the group, which also drops what the target set.
    """
    key, value = split(argument)
    if argument == "target=null":  # Hydra cannot override a group by nothing where a recipe overrides it too
        return "~target"
    if argument.startswith("-") or key not in PATHS or value in (None, "", "null"):
        return argument
    text = path_value(str(value)).replace("${", "\\${")  # OmegaConf would read ${…} as a reference
    return f"{argument.partition('=')[0]}={QuotedString(text, Quote.single).with_quotes()}"


def resumed(arguments: list[str]) -> tuple[Path, int | None] | None:
    """(run folder, new trainer.max_steps or None) if this is `resume=RUN_DIR`, else None.

    Raises UserError for anything beside it but trainer.max_steps: a resumed run is the run that was stopped.
    """
    given = dict(split(argument) for argument in arguments)
    if "resume" not in given:
        return None
    others = [key for key in given if key not in ("resume", *MAY_CHANGE)]
    if others:
        raise UserError(
            f"{others[0]} cannot be given beside resume: everything comes from the run's config.yaml and only "
            "trainer.max_steps may be changed; start a new run for anything else"
        )
    steps = given.get("trainer.max_steps")
    if steps is not None and not steps.isdecimal():
        raise UserError(f"trainer.max_steps={steps} is not a number of steps")
    return Path(path_value(given["resume"] or "")), None if steps is None else int(steps)
