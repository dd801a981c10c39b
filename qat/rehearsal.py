"""A rehearsal of `prepare`, `calibrate` and export: what they would refuse is refused before any data or evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.affine import choose_qparams, refuse_infinite
from qat.auditing import Audit, Row
from qat.errors import UserError
from qat.modules import quantized_class
from qat.modules.numerics import refuse_numerics
from qat.scheme import QuantSpec, Rule, check_block


@torch.no_grad()
def rehearse(
    model: nn.Module,
    audited: Audit,
    rules: Sequence[Rule],
    *,
    weight: Callable[[QuantSpec, Tensor], Any],
    observer: Callable[[], Any],
    calibration_batches: int,
    gelu: str | None = None,
    kv_cache: str | None = None,
    kernels: str | None = None,
) -> None:
    """Raise UserError for settings of the quantizer or observer that they refuse, static inputs without calibration,
    weights that are not finite or overflow their stored scales, and a gelu, kv_cache or kernels that it cannot
    have.

    weight, observer: as `prepare` takes them; each is tried once for every spec, on the first blocks of a weight. The
    range of every weight is looked at, at the cost of reading it twice.
    """
    refuse_numerics(model, gelu, kv_cache, kernels)
    tried: set[QuantSpec] = set()
    for row in audited.rows:
        _refuse_input(row, rules, observer, calibration_batches)
        if row.tied:
            continue
        parameter = model.get_parameter(row.name)
        if not torch.isfinite(parameter).all():
            raise UserError(f"{row.name} holds NaN or infinity: the model is damaged; load another copy of it")
        if row.spec is not None:
            matrix: Tensor = quantized_class(model.get_submodule(row.module)).canonical(parameter)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            try:
                refuse_infinite(matrix, choose_qparams(matrix, row.spec), row.spec)
            except ValueError as e:
                raise UserError(f"{row.name}: {e}") from e
            if row.spec not in tried:
                tried.add(row.spec)
                _try(weight, row.spec, matrix)


def _try(weight: Callable[[QuantSpec, Tensor], Any], spec: QuantSpec, matrix: Tensor) -> None:
    r, _ = check_block((matrix.shape[0], matrix.shape[1]), spec.block)
    try:
        weight(spec, matrix[:r])
    except (UserError, ValueError) as e:
        raise UserError(f"the quantizer refuses {spec.label()}: {e}") from e


def _refuse_input(row: Row, rules: Sequence[Rule], observer: Callable[[], Any], calibration_batches: int) -> None:
    scheme = None if row.rule is None or not row.name.endswith("weight") else rules[row.rule].scheme
    if scheme is None or scheme.input is None or row.kind == "Embedding":
        return
    if scheme.static:
        observer()
        if calibration_batches == 0:
            raise UserError(
                f"calibration_batches=0 leaves the static input range of {row.module} without data; give 1 or more"
            )
