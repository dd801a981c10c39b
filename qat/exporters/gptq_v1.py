"""A GPTQ folder in checkpoint format v1, for readers that know no v2: zero points, counted from 0, of at least 1."""

from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.exporters import gptq
from qat.exporters.gptq import caveats, missing_runtime, read, readers, refuse, refuse_together
from qat.frozen import Frozen
from qat.scheme import Scheme

RUNTIME = gptq.RUNTIME
APPENDS = gptq.APPENDS
ZERO = "a zero point of 0 cannot be stored in version 1; use target gptq, or a symmetric grid"

__all__ = [
    "RUNTIME",
    "caveats",
    "export",
    "header",
    "missing_runtime",
    "read",
    "readers",
    "refuse",
    "refuse_scheme",
    "refuse_together",
]


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why this layer cannot be trained for version 1; None if it can."""
    if scheme.weight is not None and scheme.weight.offset is not None:
        return f"training may choose a zero point of 0, and {ZERO}"
    return gptq.refuse_scheme(scheme, config)


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for a zero point of 0, weights on different grids or quantized inputs."""
    for name, w in frozen.weights.items():
        offset = w.tensor.offset
        if offset is not None and bool((offset == w.tensor.spec.type.qmin).any()):
            raise UserError(f"{name} has a zero point of 0, and {ZERO}")
    gptq.write_version(frozen, path, version=1)


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json. Raises UserError as `export` does."""
    return gptq.header(frozen, version=1)
