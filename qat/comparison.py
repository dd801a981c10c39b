"""How a file that was read back differs from what it should hold: tensors, inputs, configuration, metadata, tokenizer.

A file's configuration is compared with what the same exporter would write now, of the weights that the file has and
the configuration that it should have: that covers every key that its consumer obeys, how the weights are packed too.
"""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat import diagnosis
from qat.exporters.gguf_models import MODEL_TYPE
from qat.exporters.gguf_tokenizer import PHI3
from qat.frozen import Frozen, FrozenInput
from qat.tokenizer_diagnosis import difference as tokenizer_difference

Json = dict[str, Any]
QUANTIZATION = ("quantization_config", "quantization", "qat", "safetensors")  # the last: of weight files' headers
FREE_KEYS = {  # may differ without changing what the model computes
    *("name", "_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache"),
    *QUANTIZATION,
}


def tensors(written: Frozen, frozen: Frozen) -> tuple[list[str], bool, bool]:
    """(what differs, whether codes and stored scales are equal, whether the float32 weights are)."""
    found: list[str] = []
    codes = weights = True
    for name, want in frozen.weights.items():
        have = written.weights.get(name)
        if have is not None and diagnosis.identical(have, want):
            continue
        if have is None:
            found.append(f"{name} is quantized in the frozen model but not in the file")
            codes = weights = False
            continue
        differs = diagnosis.weights(have, want)
        if differs:
            codes = False
            found.append(f"{name}: {differs.text}")
        a, b = have.dequantize(), want.dequantize()
        if a.shape != b.shape or not torch.equal(a, b):
            weights = False
            if not differs:
                found.append(f"{name}: the weights dequantized in float32 differ{diagnosis.effect(a, b)}")
    for name, want in frozen.floats.items():
        have = written.floats.get(name)
        if have is None:
            found.append(f"{name} is missing from the file")
            weights = False
        elif differs := diagnosis.floats(have, want):
            weights = False
            found.append(f"{name}: {differs.text}")
    extra = sorted({*written.weights, *written.floats} - {*frozen.weights, *frozen.floats})
    if extra:
        found.append(f"{extra[0]} is in the file but not in the frozen model")
        weights = False
    return found, codes, weights


def inputs(written: Frozen, frozen: Frozen) -> list[str]:
    """Layers whose inputs are not quantized alike. The dtype of a stored scale is free, its value is not."""
    found: list[str] = []
    for name in sorted({*written.inputs, *frozen.inputs}):
        have, want = written.inputs.get(name), frozen.inputs.get(name)
        if (a := _said(have)) != (b := _said(want)):
            found.append(f"{name}: its input is {a} in the file, {b} in the frozen model")
        elif have and want and not (_equal(have.scale, want.scale) and _equal(have.offset, want.offset)):
            found.append(f"{name}: the input's scale or zero point differs from the calibrated one")
    return found


def _said(given: FrozenInput | None) -> str:
    if given is None:
        return "float"
    spec = replace(given.spec, scale="float32").to_dict()
    return f"{'static' if given.static else 'dynamic'} {' '.join(f'{k}={v}' for k, v in spec.items() if v)}"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a.float(), b.float())


def config(have: Json, want: Json, *, whole: bool = False, exact: bool = False) -> list[str]:
    """have: the file's configuration. want: what it should be.

    whole: the file keeps every key, so that one which is not there is a difference. exact: we wrote it, so that keys
    about quantization, and those that should not be there, are differences too.
    """
    found: list[str] = []
    want = json.loads(json.dumps(want))  # tuples become lists
    for key, value in want.items():
        if key in QUANTIZATION:
            found += [f"config {key}{said}" for said in _first(have.get(key), value)] if exact else []
        elif key not in have:
            if whole and key != "_name_or_path":
                found.append(f"config {key} is missing from the file, {value!r} in the frozen model")
        elif not whole and (value is None or key == "max_position_embeddings"):
            continue  # llama.cpp caps the context at a sliding window
        elif (key not in FREE_KEYS or (exact and key == "dtype")) and not _same(have[key], value):
            found.append(f"config {key} is {have[key]!r} in the file, {value!r} in the frozen model")
    if exact and whole:
        more = (k for k in have if k not in want and (k in QUANTIZATION or k not in FREE_KEYS) and have[k] is not None)
        found += [f"config {key} is {have[key]!r} in the file, and not in the frozen model" for key in more]
    return found


def is_our_config(found: Json) -> bool:
    """Whether this package wrote a config.json."""
    quantization = found.get("quantization_config") or {}
    return "qat" in found or quantization.get("quant_method") == "qat" or "ties" in quantization


def _first(have: Any, want: Any) -> list[str]:
    """The first place at which two JSON values differ, with both; nothing if they are equal."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted({*have, *want}):
            if key not in have or key not in want:
                where = "missing from the file" if key not in have else "not what its weights ask for"
                return [f".{key} is {where}"]
            if said := _first(have[key], want[key]):
                return [f".{key}{said[0]}"]
        return []
    return [] if have == want else [f" is {_short(have)} in the file, {_short(want)} by its weights"]


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 80 else f"{said[:80]}…"


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, float) and isinstance(have, int | float) and not isinstance(have, bool):
        return math.isclose(have, want, rel_tol=1e-6)
    if isinstance(want, dict) and isinstance(have, dict):
        return have.keys() == want.keys() and all(_same(have[k], want[k]) for k in want)
    return have == want


def metadata(have: Json, want: Json) -> list[str]:
    """The keys of two GGUF files that differ: all, if this package wrote both; else those of the architecture that both
    have, but for how long a text may be. Of the model's name only what llama.cpp reads in it counts."""
    have, want = ({**m, "general.name": bool(PHI3.search(str(m.get("general.name"))))} for m in (have, want))
    ours = is_our_metadata(have) and is_our_metadata(want)
    keys = {*have, *want} if ours else {k for k in {*have, *want} if k in have and k in want}
    if not ours:
        family = f"{want.get('general.architecture')}."
        keys = {k for k in keys if k == "general.architecture" or k.startswith(family)} - {f"{family}context_length"}
    wrong = [k for k in sorted(keys) if not _same_value(have.get(k), want.get(k))]
    return [f"metadata {k} is {_short(have.get(k))} in the file, not {_short(want.get(k))}" for k in wrong]


def is_our_metadata(found: Json) -> bool:
    """Whether this package wrote a GGUF file."""
    return MODEL_TYPE in found


def _same_value(have: Any, want: Any) -> bool:
    """Whether GGUF stores the same for both: numbers in float32."""
    if isinstance(have, list) and isinstance(want, list):
        return len(have) == len(want) and all(map(_same_value, have, want))
    if isinstance(have, int | float) and isinstance(want, int | float):
        return bool(np.float32(have) == np.float32(want)) if isinstance(want, float) else have == want
    return have == want


def tokenizer(have: dict[str, bytes], want: dict[str, bytes], *, copies: bool = True) -> list[str]:
    """Files of two tokenizers. copies: they must be equal; else they need only to split text alike."""
    if copies:
        return [f"{n}: not the tokenizer's file of the frozen model" for n in want if have.get(n) != want[n]]
    if "tokenizer.json" in want and "tokenizer.json" not in have:
        return ["the tokenizer.json is missing from the file"]
    why = tokenizer_difference(have, want)
    return [why] if why else []
