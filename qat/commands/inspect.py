"""qat inspect: every tensor of a run, frozen folder or export, with its grid and its bytes."""

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    """PATH"""
    parser.add_argument("path", type=Path, help="a run, a frozen folder or an exported folder or file")


def run(args: argparse.Namespace) -> None:
    """Prints a table; raises UserError if there is nothing to read."""
    from rich.console import Console
    from rich.table import Table

    from qat.scheme import bits_per_weight
    from qat.verification import bits_per_weight as model_bits
    from qat.verification import read_any

    frozen = read_any(args.path)
    table = Table(box=None, header_style="bold")
    for column in ("tensor", "shape", "grid", "bits/weight", "bytes"):
        table.add_column(column, justify="right" if column in ("bits/weight", "bytes") else "left", overflow="fold")
    for name, w in frozen.weights.items():
        shape, spec = w.tensor.shape, w.tensor.spec
        bits = bits_per_weight(spec, (shape[0], shape[1]))
        size = int(shape.numel() * bits / 8)
        table.add_row(name, "×".join(map(str, w.shape)), spec.label(), f"{bits:.2f}", f"{size:,}")
    for name, value in frozen.floats.items():
        kind = str(value.dtype).removeprefix("torch.")
        size = f"{value.nbytes:,}"
        table.add_row(name, "×".join(map(str, value.shape)), kind, f"{value.element_size() * 8}", size)
    for alias, name in frozen.ties.items():
        table.add_row(alias, "", f"tied to {name}", "", "0")
    console = Console(highlight=False)
    console.print(table)
    for name, i in frozen.inputs.items():
        console.print(f"input of {name}: {i.spec.label()}, {'static' if i.static else 'from each batch'}")
    console.print(f"{frozen.nbytes():,} bytes of tensors, {model_bits(frozen):.3f} bits a weight")
