"""The audit on the terminal: every parameter as quantized or left and why, repeated layers as one line."""

import os
import re

from rich.console import Console
from rich.table import Table

from qat.auditing import Audit, Row


def print_audit(audited: Audit, console: Console, *, training: bool) -> str:
    """Print the table; returns the one-line summary: coverage, expected bytes, memory needed and there."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, justify in (("parameter", "left"), ("×", "right"), ("grid", "left"), ("why", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (name, grid, why), count in _grouped(audited.rows).items():
        table.add_row(name, str(count) if count > 1 else "", grid or "[dim]float[/]", why)
    console.print(table)
    quantized = sum(r.numel for r in audited.rows if r.spec)
    share = quantized / max(1, sum(r.numel for r in audited.rows))
    text = f"{share:.1%} of the weights quantized; {_size(audited.float_nbytes)} of float32 -> {_size(audited.nbytes)}"
    if training:
        text += f"; training needs {_size(audited.training_nbytes())} plus activations, {_size(_available())} are free"
    return text


def _grouped(rows: list[Row]) -> dict[tuple[str, str, str], int]:
    """Rows that differ only in numbers (layer indices) count as one."""
    out: dict[tuple[str, str, str], int] = {}
    for row in rows:
        name = re.sub(r"\.\d+\.", ".*.", row.name)
        key = (name, row.spec.label() if row.spec else "", re.sub(r"\.\d+\.", ".*.", row.reason))
        out[key] = out.get(key, 0) + 1
    return out


def _available() -> int:
    """Free memory in bytes of this machine's RAM."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
