"""`qat train|eval|export|verify|inspect|generate`, and `python -m qat`; maps errors to exit codes."""

import argparse
import sys
from importlib import import_module

from qat.errors import UserError, VerifyError, disk_errors

COMMANDS = {"eval": "evaluate", "export": "export", "verify": "verify", "inspect": "inspect", "generate": "generate"}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, 2 for wrong input, 3 for a failed verification.

    Anything else is a bug and leaves by its traceback (exit code 1).
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # Hydra has a command line of its own
        from qat.entry import main as train

        return train(argv[1:])
    args = _parser().parse_args(argv)
    try:
        with disk_errors():
            args.run(args)
    except (UserError, VerifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qat", description="Quantization-aware training: what you train is what you ship."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="run a recipe: qat train recipe=NAME [key=value ...]")
    for name, file in COMMANDS.items():
        module = import_module(f"qat.commands.{file}")
        about = (module.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        command = commands.add_parser(name, help=about, description=about)
        module.add(command)
        command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
