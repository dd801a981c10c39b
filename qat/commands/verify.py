"""qat verify: is the written file what was trained, and what does its real runtime make of it? Exit code 3 if not."""

import argparse
import json
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """PATH [--against RUN_OR_FOLDER]"""
    parser.add_argument(
        "path", type=Path, help="an exported folder or file, a frozen folder, or a run (all its exports)"
    )
    parser.add_argument("--against", type=Path, help="run folder, frozen folder or another export to compare with")
    parser.add_argument("--no-runtime", action="store_true", help="compare tensors only")
    parser.add_argument("--json", type=Path, help="also write the verdicts to this file")


def run(args: argparse.Namespace) -> None:
    """Raises VerifyError naming the first tensor that differs."""
    from rich.console import Console

    from qat.errors import UserError
    from qat.files import atomic_write, refuse_unwritable
    from qat.stages import bar
    from qat.verification import verify, verify_run

    if args.json:  # before the work
        if args.json.is_dir():
            raise UserError(f"--json={args.json} is a folder; give a file")
        refuse_unwritable("--json", args.json.absolute().parent)
    with bar(f"verify {args.path}", Console(stderr=True)) as shown, shown.follow():
        if (args.path / "frozen").is_dir():
            verdicts = verify_run(args.path, against=args.against, runtime=not args.no_runtime)
        else:
            verdicts = {args.path.name: verify(args.path, against=args.against, runtime=not args.no_runtime)}
    for name, verdict in verdicts.items():
        print(f"{name} ({verdict.target})")
        print("\n".join(verdict.lines()))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {
            n: {"figures": v.figures, "differences": v.differences, "unchecked": v.unchecked}
            for n, v in verdicts.items()
        }
        atomic_write(args.json, json.dumps(found, indent=1))
    for verdict in verdicts.values():
        verdict.raise_if_different()
