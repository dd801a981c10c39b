"""qat export: pack the frozen codes of a run for another target; nothing is quantized again."""

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """RUN --to TARGET[,TARGET] [--out FOLDER]"""
    parser.add_argument("path", type=Path, help="a run folder or a frozen folder")
    parser.add_argument("--to", required=True, help="targets, separated by commas: gguf,hf,onnx")
    parser.add_argument("--out", type=Path, help="folder to write TARGET/ into (default: RUN/export)")
    parser.add_argument("--no-verify", action="store_true", help="do not read the files back and run them")


def run(args: argparse.Namespace) -> None:
    """Raises UserError for a grid that a target cannot hold, VerifyError if a written file is not equal."""
    from qat.errors import UserError
    from qat.exporters import export, target_module
    from qat.files import refuse_unwritable
    from qat.report.card import model_card
    from qat.verification import read_any, verify

    if not args.path.is_dir():
        raise UserError(f"{args.path} is not a folder: give a run folder or a frozen folder")
    names = [name for name in args.to.replace("+", ",").split(",") if name]
    if not names:
        raise UserError("--to names no target: give for example --to gguf,hf")
    for name in names:
        target_module(name)
    frozen = read_any(args.path)
    is_run = (args.path / "frozen").is_dir()
    out = args.out or (args.path / "export" if is_run else None)
    if out is None:
        raise UserError(f"{args.path} is not a run folder: say where to write with --out FOLDER")
    refuse_unwritable("--out", out)
    for name in names:
        path = export(frozen, name, out / name, card=model_card(frozen, name, args.path))
        print(f"{name}: wrote {path}")
        if not args.no_verify:
            verdict = verify(path, against=args.path)
            verdict.raise_if_different()
            print("\n".join(verdict.lines()))
