"""Files that nobody should have written: whatever is wrong with them, the reader says so and nothing else happens."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import gptq
from parity import rules, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.exporters import export, read_any
from qat.rescue import source
from qat.verification import verify

# format -> target, scheme, the top-level keys of config.json that say how it is quantized
FORMATS = {
    "compressed-tensors": ("hf", "int4_g128_asymmetric", ("quantization_config",)),
    "w8a8": ("hf", "w8a8_static", ("quantization_config",)),
    "qat": ("hf", "llama_q4_1", ("quantization_config",)),
    "gptq": ("gptq", "int4_g128_asymmetric", ("quantization_config", "qat")),
    "awq": ("awq", "int4_g128_asymmetric", ("quantization_config", "qat")),
    "torchao": ("torchao", "8da4w", ("quantization_config", "qat")),
    "mlx": ("mlx", "mlx_int4_g64", ("quantization", "qat")),
}
VALUES: tuple[Any, ...] = (None, 7, 10**9, -1, 0, False, "x", [], {}, [{}])
CONFIG = ("model_type", "architectures", "hidden_size", "num_attention_heads", "rope_parameters", "tie_word_embeddings")


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be replaced: every key, and every item of a list."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(node[key], (*path, key))


def changed(config: dict[str, Any], place: tuple[Any, ...], value: Any) -> str:
    """config.json with another value there; Ellipsis: without it."""
    copy = json.loads(json.dumps(config))
    node = copy
    for key in place[:-1]:
        node = node[key]
    if value is ...:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return json.dumps(copy)


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_in_a_configuration(name: str, tmp_path: Path) -> None:
    """A key that says what the tensors say too may change nothing; whatever else happens is one of our two errors."""
    target, scheme, keys = FORMATS[name]
    _, frozen = trained("llama", rules(scheme), num_hidden_layers=1)
    frozen.save(tmp_path / "frozen")
    path = export(frozen, target, tmp_path / "out")
    (path / "manifest.json").unlink()
    file = path / "config.json"
    config = json.loads(file.read_text())
    chance = random.Random(0)
    parts = [p for key in keys for p in [(key,), *places(config[key], (key,))]]
    tried = [(p, v) for p in chance.sample(parts, min(20, len(parts))) for v in (..., *chance.sample(VALUES, 2))]
    tried += [((key,), v) for key in CONFIG for v in chance.sample(VALUES, 2)]
    wrong: list[str] = []
    for place, value in tried:
        file.write_text(changed(config, place, value))
        for what in (lambda: verify(path, against=tmp_path / "frozen", runtime=False), lambda: source(path)):
            try:
                what()
            except (UserError, VerifyError):
                pass
            except Exception as error:
                wrong.append(f"{place} = {value!r}: {error!r}")
    assert not wrong, "\n".join(wrong)
