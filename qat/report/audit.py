"""The audit on the terminal: every parameter as quantized or left and why, repeated layers as one line."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qat.auditing import Audit, Row
from qat.budget import size


def print_audit(audited: Audit, console: Console, *, exports: Sequence[str]) -> str:
    """Print the table; returns the one-line summary: coverage, and the bytes to expect in memory and in each export."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, justify in (("parameter", "left"), ("×", "right"), ("grid", "left"), ("why", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (name, grid, why), count in _grouped(audited.rows).items():
        table.add_row(name, str(count) if count > 1 else "", grid or "[dim]float[/]", why)
    console.print(table)
    quantized = sum(r.numel for r in audited.rows if r.spec)
    share = quantized / max(1, sum(r.numel for r in audited.rows))
    text = f"{share:.1%} of the weights quantized; {size(audited.float_nbytes)} become {size(audited.nbytes)}"
    files = ", ".join(f"{target} {size(audited.export_nbytes(target))}" for target in exports)
    return f"{text}; files without tokenizer and header: {files}" if files else text


def _grouped(rows: list[Row]) -> dict[tuple[str, str, str], int]:
    """Rows that differ only in numbers (layer indices) count as one."""
    out: dict[tuple[str, str, str], int] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row.name)
        key = (name, row.spec.label() if row.spec else "", re.sub(r"\.\d+\.", ".*.", row.reason))
        out[key] = out.get(key, 0) + 1
    return out
