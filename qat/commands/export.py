"""qat export: pack decided codes for another target, a run's or another tool's; nothing is quantized again."""

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """PATH --to TARGET[,TARGET] [--out FOLDER]"""
    parser.add_argument(
        "path", type=Path, help="a run, a frozen folder, or a quantized checkpoint that another tool made"
    )
    parser.add_argument("--to", required=True, help="targets, separated by commas: gguf,hf,onnx")
    parser.add_argument("--out", type=_folder, help="folder to write TARGET/ into (default: RUN/export)")
    parser.add_argument("--no-verify", action="store_true", help="do not read the files back and run them")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder, . for this one")
    return Path(text)


def run(args: argparse.Namespace) -> None:
    """Raises UserError for a grid that a target cannot hold, VerifyError if a written file is not equal."""
    from qat.errors import UserError, VerifyError
    from qat.exporters import export, target_module
    from qat.files import refuse_foreign, refuse_unwritable, set_aside
    from qat.report.card import model_card
    from qat.rescue import fit, is_ours, source
    from qat.verification import verify

    if not args.path.exists():
        raise UserError(f"{args.path} does not exist: give a run folder, a frozen folder or a quantized checkpoint")
    names = [name for name in args.to.replace("+", ",").split(",") if name]
    if not names:
        raise UserError("--to names no target: give for example --to gguf,hf")
    for name in names:
        target_module(name)
    ours = is_ours(args.path)
    is_run = (args.path / "frozen").is_dir()
    out = args.out or (args.path / "export" if is_run else None)
    if out is None:
        raise UserError(f"{args.path} is not a run folder: say where to write with --out FOLDER")
    refuse_unwritable("--out", out)
    for name in names:
        refuse_foreign(out / name)
    frozen = source(args.path)
    for name in names:
        fitted, moved = fit(frozen, name)
        path = export(fitted, name, out / name, card=model_card(fitted, name, args.path, trained=ours))
        print("\n".join([f"{name}: wrote {path}", *(f"  {line}" for line in moved)]))
        if not args.no_verify:
            try:
                verdict = verify(path, against=args.path)
                verdict.raise_if_different()
            except VerifyError as error:
                raise VerifyError(f"{name}: {error}; what was written is kept as {set_aside(path)}") from error
            print("\n".join(verdict.lines()))
