"""A target that promises a folder for plain transformers and vLLM keeps it, or is refused at the audit."""

from collections.abc import Sequence
from typing import Any

import torch

from qat.affine import QTensor
from qat.auditing import Audit
from qat.errors import UserError
from qat.exporters import compressed_tensors
from qat.frozen import Frozen, FrozenInput, FrozenWeight
from qat.scheme import Rule


def refuse_fallback(quant_method: str | None, audited: Audit, rules: Sequence[Rule], config: dict[str, Any]) -> None:
    """Raises UserError if the hf folder must have quant_method "compressed-tensors" and would have "qat", or if
    `quant_method` is neither that nor None, which leaves the choice to the exporter. config: the model's, with the
    keys gelu and kv_cache of the scheme.
    """
    if quant_method is None:
        return
    if quant_method != compressed_tensors.METHOD:
        raise UserError(f"quant_method={quant_method} is not possible; choose {compressed_tensors.METHOD} or null")
    why = compressed_tensors.why_not(_expected(audited, rules, config), torch.float32)
    if why:
        raise UserError(
            f"a folder that plain transformers and vLLM load is what this target is for, and this model's would need "
            f"`import qat`: {why}; give quant_method=null to have that, or target=portable_int4 for GGUF as well"
        )


def _expected(audited: Audit, rules: Sequence[Rule], config: dict[str, Any]) -> Frozen:
    """What will be frozen, as far as grids go; every scale is 1, which any dtype holds."""
    one = torch.ones(1, 1)
    frozen = Frozen({}, {}, config=config)
    weights: dict[str, FrozenWeight] = {}
    for row in audited.rows:
        scheme = None if row.rule is None or not row.name.endswith("weight") else rules[row.rule].scheme
        if row.tied and row.spec is not None:
            frozen.ties[row.name] = row.tied
        elif row.spec is not None:
            weights[row.name] = FrozenWeight(QTensor(torch.empty(0, 0), one, None, row.spec), row.kind, row.shape)
        if scheme is not None and scheme.input is not None and row.kind != "Embedding":
            scale = one if scheme.static else None
            frozen.inputs[row.module] = FrozenInput(scheme.input, scheme.static, scale)
    frozen.weights = weights
    return frozen
