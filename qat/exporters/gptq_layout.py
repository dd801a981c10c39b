"""What GPTQ and AWQ folders share: grids of one width, float16 scales, zero points counted from 0, one grid for all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.exporters.hf_folder import (
    base_config,
    described,
    floats_of,
    frozen_weight,
    parts_of,
    read_config,
    read_tensors,
    refuse_model,
    said_of,
    tokenizer_files,
)
from qat.exporters.hf_layout import CONV1D, Part
from qat.frozen import Frozen, FrozenWeight
from qat.scheme import QuantSpec, Scheme

GROUPS = (16, 32, 64, 128)
GPT2 = (
    "transformers 5.23 raises on a GPT-2 with packed layers; gptqmodel's own loader takes it, in half precision and "
    "with backend=BACKEND.GPTQ_TORCH or AWQ_TORCH_ATEN (its fused float32 kernel for CPUs computes other numbers)"
)


def refuse(
    kind: str,
    shape: tuple[int, ...],
    spec: QuantSpec | None,
    config: dict[str, Any],
    method: str,
    widths: tuple[int, ...],
) -> str | None:
    """Why the format cannot hold this parameter, and what to do; None if it can. widths: the bits it has."""
    if reason := refuse_model(config):
        return reason
    made = config.get("architectures") or ["ForCausalLM"]
    if not made[0].endswith(("ForCausalLM", "LMHeadModel")):
        return f"{method} is read for causal language models, not {made[0]}; use another target, such as hf or onnx"
    gpt2 = kind == "Conv1D" and config.get("model_type") == "gpt2"
    if spec is None and gpt2 and len(shape) == 2:  # a bias has the kind of its layer
        return "gptqmodel takes every Conv1D of a GPT-2 as quantized; give it a rule as well, or export=hf"
    if spec is None:
        return None
    bits = spec.type.bits
    if kind != "Linear" and not gpt2:
        return f"{method} is for Linear layers and GPT-2's Conv1D, not {kind}; leave it out of the rules"
    if bits not in widths:
        nearest = min(widths, key=lambda b: abs(b - bits))
        return f"{bits} bits do not fit {method}, which has {', '.join(map(str, widths))}; int{nearest} does"
    if spec.block[0] != 1 or spec.block[1] not in (*GROUPS, -1):
        return (
            f"block {spec.block} does not fit; (1, {_nearest(spec.block[1])}) is the nearest, or (1, -1), a whole row"
        )
    if spec.qtype == "ternary" or spec.offset not in (None, "zero_point"):
        return f"grid {spec.label()} does not fit; int{bits}, symmetric or with a zero point, is the nearest"
    if spec.scale not in ("portable", "float16"):
        return f"scales are stored in float16: use scale 'portable' (exact in bfloat16 too), not {spec.scale!r}"
    if any(n * bits % 32 for n in shape):
        return (
            f"int{bits} codes are packed into int32 words both ways, so {shape} must be multiples of {32 // bits}; "
            "leave it out of the rules, or export=hf, which has no such limit"
        )
    return None


def _nearest(group: int) -> int:
    return min(GROUPS, key=lambda g: abs(g - group))


def refuse_scheme(scheme: Scheme, config: dict[str, Any]) -> str | None:
    """Why this layer's input cannot be as it was trained; None if it is float."""
    return None if scheme.input is None else "its input is quantized, but this format's layers take float inputs"


def refuse_together(specs: Mapping[str, QuantSpec]) -> str | None:
    """Why these weights cannot be in one file, naming one; None if they can."""
    first, *others = specs
    want = _global(specs[first])
    odd = next((n for n in others if _global(specs[n]) != want), None)
    if odd is None:
        return None
    return f"{odd} ({specs[odd].label()}) and {first} ({specs[first].label()}) differ; the format has one grid"


def _global(spec: QuantSpec) -> tuple[int, int, bool]:
    return spec.type.bits, spec.block[1], spec.offset is None


def caveats(frozen: Frozen) -> list[str]:
    """What gptqmodel does differently from training."""
    values = ((w.dequantize(torch.float16), w.dequantize()) for w in frozen.weights.values())
    if all(torch.equal(half.float(), full) for half, full in values):
        return []
    return ["gptqmodel multiplies codes and scales in float16, which rounds some weights; training in float32"]


def readers(frozen: Frozen) -> list[str]:
    """Who cannot load the folder."""
    return [GPT2] if any(w.kind == "Conv1D" for w in frozen.weights.values()) else []


def check(frozen: Frozen) -> QuantSpec:
    """The grid of all weights. Raises UserError if there is more than one, or a quantized input."""
    specs = {n: w.tensor.spec for n, w in frozen.weights.items()}
    for name, scheme in frozen.schemes().items():
        if why := refuse_scheme(scheme, frozen.config):
            raise UserError(f"{name}: {why}")
    if not specs:
        raise UserError("no weight is quantized")
    left = next((n for n in frozen.floats if n.endswith(CONV1D) and frozen.config.get("model_type") == "gpt2"), None)
    if why := refuse_together(specs) or (left and f"{left} is float, and gptqmodel takes every Conv1D as quantized"):
        raise UserError(why)
    return next(iter(specs.values()))


def zeros(w: FrozenWeight) -> Tensor:
    """Zero points (out, in / g), uint8 from 0 on; the middle code of a symmetric grid."""
    q = w.tensor
    middle = torch.zeros_like(q.scale, dtype=torch.int32) if q.offset is None else q.offset
    return (middle - q.spec.type.qmin).to(torch.uint8)


def scales(w: FrozenWeight) -> Tensor:
    """float16 (in / g, out)."""
    return w.tensor.scale.to(torch.float16).t().contiguous()


def tensors(words: Callable[[FrozenWeight], dict[str, Part]], frozen: Frozen) -> Iterator[tuple[str, Part]]:
    """What makes every tensor of the folder; words: those of one layer."""
    yield from floats_of(frozen)
    yield from parts_of(frozen, lambda name, w: {f"{name.removesuffix('weight')}{k}": t for k, t in words(w).items()})


def config_of(frozen: Frozen, quantization: dict[str, Any]) -> dict[str, Any]:
    """config.json: the model's, ours under "qat", and the format's."""
    return base_config(frozen) | described(frozen) | {"quantization_config": quantization}


def open_folder(path: Path, method: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(config, quantization_config, our key "qat", tensors). Raises UserError for a folder of another method."""
    config = read_config(path)
    found = config.pop("quantization_config", None) or {}
    if found.get("quant_method") != method:
        raise UserError(f"{path}: its quant_method is {found.get('quant_method')!r}, not {method!r}")
    return config, found, config.pop("qat", None) or {}, read_tensors(path)[0]


def bits_of(found: dict[str, Any]) -> int:
    """Of a code. Raises ValueError for what is not from 2 to 8."""
    bits = int(found["bits"])
    if not 2 <= bits <= 8:
        raise ValueError(f"quantization_config.bits is {bits}")
    return bits


def restored(
    name: str, codes: Tensor, zero: Tensor, scale: Tensor, found: dict[str, Any], about: dict[str, Any]
) -> FrozenWeight:
    """One weight from unsigned codes (out, in), zero points and scales (out, in / g).

    A file that says it is symmetric, with zero points that are not the middle code, is read as these say. Raises
    ValueError if it says another group size than its scales have.
    """
    bits, said = bits_of(found), said_of(name, about or None)
    groups = scale.shape[1]
    size = codes.shape[1] // groups
    written = found.get("group_size")  # -1: a whole row; some writers round it up to no more than that
    written = size if written is None else codes.shape[1] if int(written) == -1 else min(int(written), codes.shape[1])
    if written != size or zero.shape != scale.shape:
        raise ValueError(
            f"quantization_config.group_size is {found.get('group_size')}, with scales {tuple(scale.shape)} and zero "
            f"points {tuple(zero.shape)} for codes {tuple(codes.shape)}"
        )
    middle = bool((zero == 2 ** (bits - 1)).all())
    symmetric = middle and (said.offset is None if said else bool(found.get("sym", False)))
    said = None if said and (said.offset is None) != symmetric else said
    kind: dict[str, Any] = {} if symmetric else {"range": "minmax", "offset": "zero_point"}
    qtype = f"int{bits}"  # signed, which compressed-tensors and torchao hold as well
    block = (1, -1) if groups == 1 and found.get("group_size") in (None, -1) else (1, size)
    spec = QuantSpec(qtype=qtype, block=block, scale="float16", **kind)
    return frozen_weight(codes, scale, None if symmetric else zero, spec, said)


def collect(
    path: Path,
    config: dict[str, Any],
    about: dict[str, Any],
    weights: dict[str, FrozenWeight],
    floats: dict[str, Tensor],
) -> Frozen:
    """The folder's Frozen. Weights come as Linear's, (out, in); GPT-2's get their Conv1D back."""
    if config.get("model_type") == "gpt2":
        conv = {n: w for n, w in weights.items() if n.endswith(CONV1D)}
        weights |= {n: replace(w, kind="Conv1D", shape=w.shape[::-1]) for n, w in conv.items()}
    return Frozen(weights, floats, ties=about.get("ties", {}), config=config, tokenizer=tokenizer_files(path))
