"""Audit: before any work, every parameter of a model as quantized or left, and why; refuses what cannot be done.

Refusals are UserErrors: a rule that matches nothing, a block that does not divide a shape, tied weights with two
schemes, a grid that a requested export cannot hold.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from qat.errors import UserError
from qat.modules import LAYERS, full_name
from qat.modules import kind as kind_of
from qat.nearest import divides, nearest, whole_block
from qat.scheme import QuantSpec, Rule, bits_per_weight, matrix

TAKE_CONV1D = (
    "give target=llama_cpp, target=mlx, target=onnxruntime_int4 or target=portable_int4, which take Conv1D as well"
)


@dataclass(frozen=True)
class Row:
    """One parameter. shape: its own; matrix: (out, in), what is cut into blocks. dtype: in memory. module: the owning
    module's path. tied: the parameter that holds the same tensor and is listed first, or "". rule: index of the rule
    that decided."""

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    dtype: torch.dtype
    spec: QuantSpec | None
    rule: int | None
    tied: str
    reason: str

    @property
    def numel(self) -> int:
        return 0 if self.tied else int(self.matrix[0] * self.matrix[1])

    def nbytes(self, dtype: torch.dtype) -> float:
        """Bytes when stored: codes, scales and offsets, or floats of `dtype`; none where it is tied to another."""
        return self.numel * (dtype.itemsize if self.spec is None else bits_per_weight(self.spec, self.matrix) / 8)


@dataclass(frozen=True)
class Audit:
    rows: list[Row]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights when packed, floats as they are in memory."""
        return int(sum(r.nbytes(r.dtype) for r in self.rows))

    @property
    def float_nbytes(self) -> int:
        return sum(r.numel * r.dtype.itemsize for r in self.rows)

    def export_nbytes(self, target: str) -> int:
        """Bytes that the export holds besides its tokenizer and header."""
        stored = getattr(import_module(f"qat.exporters.{target}"), "stored_dtype", _as_it_is)
        return int(sum(r.nbytes(stored(r.name, r.shape, r.dtype)) for r in self.rows))

    def coverage(self) -> list[dict[str, Any]]:
        """The report's `coverage`: name, shape, scheme, reason of every parameter."""
        schemes = [r.spec.label() if r.spec else "float" for r in self.rows]
        entries = zip(self.rows, schemes, strict=True)
        return [{"name": r.name, "shape": list(r.shape), "scheme": s, "reason": r.reason} for r, s in entries]


def _as_it_is(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    return dtype


def _match(rules: Sequence[Rule], path: str, kind: str) -> int | None:
    for i, rule in enumerate(rules):
        if re.fullmatch(rule.path, path) and re.fullmatch(rule.type, kind):
            return i
    return None


def _matrix(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    return matrix(kind, shape)


def audit(
    model: nn.Module, rules: Sequence[Rule], *, targets: Sequence[str] = (), config: dict[str, Any] | None = None
) -> Audit:
    """What `prepare` would do to `model`, checked against the exporters of `targets`.

    Raises UserError as listed above, naming the parameter and the nearest thing that works.
    """
    _refuse_patterns(rules)
    rows: list[Row] = []
    first: dict[int, Row] = {}
    used: set[int] = set()
    for path, module in model.named_modules():
        kind = kind_of(module)
        known = full_name(module) in LAYERS
        index = _match(rules, path, kind) if known else None
        if index is not None:
            used.add(index)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            shape = tuple(parameter.shape)
            spec = None
            if leaf != "weight":
                reason = "a bias stays in floating point" if leaf == "bias" else f"not a weight matrix of {kind}"
            elif not known:
                reason = f"{kind} is not a layer that can be quantized"
            elif index is None:
                reason = "no rule matches it"
            else:
                scheme = rules[index].scheme
                spec = scheme.weight if scheme else None
                reason = f"rule {index + 1}" if spec else f"rule {index + 1} leaves it"
            row = Row(name, path, kind, shape, _matrix(kind, shape), parameter.dtype, spec, index, "", reason)
            holder = first.setdefault(id(parameter), row)
            if holder is not row:
                row = _tie(holder, row)
            rows.append(row)
    _refuse_unused(rules, used, model, targets)
    _refuse_shapes(rows, targets, config or {})
    _refuse_inputs(rows, rules)
    rows = _resolve_ties(rows)
    for target in targets:
        _refuse_target(rows, target, config or {}, rules)
    if rules and not any(r.spec for r in rows):
        raise UserError("no parameter is quantized: every rule leaves what it matches in floating point")
    return Audit(rows)


def _tie(holder: Row, row: Row) -> Row:
    return replace(row, tied=holder.name, reason=f"tied to {holder.name}")


def _resolve_ties(rows: list[Row]) -> list[Row]:
    """One grid for one tensor: tied parameters take the holder's scheme, and two different schemes are refused."""
    schemes: dict[str, Row] = {}
    for row in rows:
        key = row.tied or row.name
        if row.spec is None:
            continue
        other = schemes.setdefault(key, row)
        if other.spec != row.spec:
            raise UserError(
                f"{other.name} and {row.name} are one tied tensor but get two schemes ({other.spec.label()} and "  # pyright: ignore[reportOptionalMemberAccess]
                f"{row.spec.label()}); give both the same scheme, or untie them in the model"
            )
    out: list[Row] = []
    for row in rows:
        decided = schemes.get(row.tied or row.name)
        if decided is not None and row.spec is None:
            reason = row.reason if row.tied else f"tied to {decided.name}"
            row = replace(row, spec=decided.spec, rule=decided.rule, reason=reason)
        out.append(row)
    return out


def _refuse_patterns(rules: Sequence[Rule]) -> None:
    for i, rule in enumerate(rules):
        for pattern in (rule.path, rule.type):
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"rule {i + 1}: {pattern!r} is not a regular expression: {e}") from e


def _refuse_inputs(rows: list[Row], rules: Sequence[Rule]) -> None:
    """Inputs are flattened to rows of `in` features, of which there may be any number; a Conv2d's are not rows."""
    for row in rows:
        scheme = None if row.rule is None or not row.name.endswith("weight") else rules[row.rule].scheme
        if scheme is None or scheme.input is None or row.kind == "Embedding":
            continue
        r, c = scheme.input.block
        if row.kind == "Conv2d" and (r, c) != (-1, -1):
            raise UserError(f"{row.module}: the input of a Conv2d takes block (-1, -1), not ({r}, {c})")
        if r not in (1, -1) or (c != -1 and row.matrix[1] % c):
            raise UserError(
                f"{row.module}: input block ({r}, {c}) does not fit inputs of {row.matrix[1]} features; use (1, -1) "
                "for one scale a token, (-1, -1) for one in all, or (1, n) with n a divisor"
            )


def _refuse_unused(rules: Sequence[Rule], used: set[int], model: nn.Module, targets: Sequence[str]) -> None:
    for i, rule in enumerate(rules):
        if i in used:
            continue
        found = {kind_of(m): n for n, m in reversed(list(model.named_modules())) if full_name(m) in LAYERS}
        remedy = "correct or remove the rule (an earlier one may win)"
        if targets and "Conv1D" in found and re.fullmatch(rule.type, "Linear"):
            remedy = f"this scheme takes Linear layers alone, and {found['Conv1D']} is a Conv1D; {TAKE_CONV1D}"
        raise UserError(
            f"rule {i + 1} (path {rule.path!r}, type {rule.type!r}) decides nothing in this model, whose quantizable "
            f"layers are of type {', '.join(sorted(found)) or 'none'}; {remedy}"
        )


def _refuse_shapes(rows: list[Row], targets: Sequence[str], config: dict[str, Any]) -> None:
    odd = [row for row in rows if row.spec is not None and not divides(row.spec, row.matrix)]
    if not odd:
        return
    typed: list[str | None] = []
    for rule, spec in dict.fromkeys((row.rule, row.spec) for row in odd):
        assert rule is not None
        assert spec is not None
        same = [(r.name, r.kind, r.shape, r.matrix) for r in rows if r.rule == rule and r.spec is not None]
        typed.append(nearest(same, spec, rule, targets, config))
    named = [t for t in typed if t]
    whole = next((t for t in named if t.startswith("target=")), " ".join(named))  # a scheme settles every rule
    first, spec = odd[0], odd[0].spec
    assert spec is not None
    path = re.sub(r"\.\d+\\", r".\\d+\\", re.escape(first.module))
    raise UserError(
        f"{first.name} is {first.matrix[0]} rows of {first.matrix[1]} weights, which blocks of {whole_block(spec)} do "
        f"not divide; {f'give {whole}, or ' if None not in typed else ''}leave such layers in floating point by the "
        f"rule {{_target_: qat.scheme.Rule, path: '{path}'}} put first in a scheme file"
    )


def _refuse_target(rows: list[Row], target: str, config: dict[str, Any], rules: Sequence[Rule]) -> None:
    module = import_module(f"qat.exporters.{target}")
    refuse_scheme = getattr(module, "refuse_scheme", None)  # of a weight and its layer's input together
    for row in rows:
        why = module.refuse(row.name, row.kind, row.shape, row.spec, config)
        scheme = None if row.rule is None or not row.name.endswith("weight") else rules[row.rule].scheme
        if why is None and refuse_scheme and scheme and row.kind != "Embedding":
            why = refuse_scheme(scheme, config)
        if why:
            if row.kind == "Conv1D" and module.refuse(row.name, "Linear", row.shape, row.spec, config) is None:
                why = f"{why}, or {TAKE_CONV1D}"
            raise UserError(f"export to {target}: {row.name} (shape {tuple(row.shape)}): {why}")
    together = getattr(module, "refuse_together", None)  # of formats with one grid for the whole file
    specs = {row.name: row.spec for row in rows if row.spec is not None}
    if together and specs and (why := together(specs)):
        raise UserError(f"export to {target}: {why}")
