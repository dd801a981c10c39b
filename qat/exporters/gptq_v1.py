"""A GPTQ folder in checkpoint format v1, for readers that know no v2: symmetric grids only."""

from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.exporters import gptq
from qat.exporters.gptq import caveats, missing_runtime, read, refuse_scheme, refuse_together
from qat.frozen import Frozen
from qat.scheme import QuantSpec

RUNTIME = gptq.RUNTIME

__all__ = [
    "RUNTIME",
    "caveats",
    "export",
    "header",
    "missing_runtime",
    "read",
    "refuse",
    "refuse_scheme",
    "refuse_together",
]


def refuse(name: str, kind: str, shape: tuple[int, ...], spec: QuantSpec | None, config: dict[str, Any]) -> str | None:
    """Why format v1 cannot hold this parameter, and what to do; None if it can."""
    if spec is not None and spec.offset is not None:
        return "a zero point of 0 cannot be stored in version 1; use target gptq, or a symmetric grid"
    return gptq.refuse(name, kind, shape, spec, config)


def export(frozen: Frozen, path: Path) -> None:
    """Write the folder. Raises UserError for zero points, weights on different grids or quantized inputs."""
    for name, w in frozen.weights.items():
        if why := refuse(name, w.kind, w.shape, w.tensor.spec, frozen.config):
            raise UserError(f"{name}: {why}")
    gptq.write_version(frozen, path, version=1)


def header(frozen: Frozen) -> dict[str, Any]:
    """config.json. Raises UserError as `export` does."""
    return gptq.header(frozen, version=1)
