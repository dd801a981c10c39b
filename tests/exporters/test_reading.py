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
from foreign_checkpoints import gptq, llama_gguf
from gguf import GGMLQuantizationType, GGUFReader
from peer_logits import rules, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.errors import UserError, VerifyError
from qat.exporters import export
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


def first(stored: dict[str, Tensor], end: str) -> str:
    return next(name for name in sorted(stored) if name.endswith(end))


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_fill(-1, torch.tensor([0]), value)


# what is done to a sound GPTQ folder, as AutoGPTQ writes it: to one tensor, or to its quantization_config; what is said
TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "zero points for one group of two": ("qzeros", lambda t: t[:1].clone(), "zero points"),
    "no scales": ("scales", lambda t: t[:0].clone(), "ZeroDivisionError"),
    "one scale": ("scales", lambda t: t[0, 0].clone(), "decoded"),
    "one word": ("qweight", lambda t: t[0, 0].clone(), "decoded"),
    "no order": ("g_idx", lambda t: t[:0].clone(), "columns in another order"),
    "whole scales": ("scales", lambda t: t.long(), "scales or offsets are torch.int64"),
    "one order": ("g_idx", lambda t: t[0].clone(), "columns in another order"),
    "a scale of NaN": ("scales", spoiled(float("nan")), "NaN or infinite values in its scales"),
    "an infinite scale": ("scales", spoiled(float("inf")), "NaN or infinite values in its scales"),
    "a norm of NaN": ("norm.weight", spoiled(float("nan")), "holds NaN or infinite values"),
    "an infinite embedding": ("embed_tokens.weight", spoiled(float("-inf")), "holds NaN or infinite values"),
}
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not known"),
    "no version": ({"checkpoint_format": None}, "checkpoint_format None is not known"),
    "other groups": ({"group_size": 64}, "group_size is 64, with scales"),
    "no groups": ({"group_size": 0}, "group_size is 0, with scales"),
    "whole rows": ({"group_size": -1}, "group_size is -1, with scales"),
    "no bits": ({"bits": 0}, "bits is 0"),
    "null bits": ({"bits": None}, "decoded"),
    "many bits": ({"bits": 10**9}, "bits is 1000000000"),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "theirs"
    gptq(folder, 1, symmetric=True, group=32)
    assert source(folder).weights
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        os.link(file, to / file.name)
    return to


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_no_writer_meant(name: str, theirs: Path, tmp_path: Path) -> None:
    end, change, said = TENSORS[name]
    folder = copied(theirs, tmp_path / "x")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    key = first(stored, end)
    save_file({**stored, key: change(stored[key])}, folder / "model.safetensors")
    with pytest.raises(VerifyError, match=said):
        source(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_no_writer_meant(name: str, theirs: Path, tmp_path: Path) -> None:
    change, said = SETTINGS[name]
    folder = copied(theirs, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        changed(config, ("quantization_config",), config["quantization_config"] | change)
    )
    with pytest.raises((UserError, VerifyError), match=said):
        source(folder)


def test_groups_that_the_configuration_does_not_name(theirs: Path, tmp_path: Path) -> None:
    folder = copied(theirs, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    for value in (..., None):
        (folder / "config.json").write_text(changed(config, ("quantization_config", "group_size"), value))
        assert source(folder).digests() == source(theirs).digests()


def folder_in_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def looping(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder": ("model.safetensors", folder_in_place),
    "loop": ("model.safetensors", looping),
    "dangling": ("model.safetensors", lambda f: (f.unlink(), f.symlink_to("nowhere"))),
    "number": ("model.safetensors.index.json", lambda f: f.write_text('{"weight_map": {"a": 7}}')),
    "list": ("model.safetensors.index.json", lambda f: f.write_text("[]")),
    "deep": ("config.json", lambda f: (f.unlink(), f.write_text("[" * 100_000))),
    "text": ("config.json", lambda f: (f.unlink(), f.write_text('"quantization_config"'))),
    "no config": ("config.json", folder_in_place),
    "empty manifest": ("manifest.json", lambda f: f.write_text("[]")),
    "odd manifest": ("manifest.json", lambda f: f.write_text('{"kind": "export", "files": {"a": 7}, "tensors": {}}')),
    "no tensors": ("manifest.json", lambda f: f.write_text('{"kind": "export", "files": {}, "tensors": 7}')),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(name: str, theirs: Path, tmp_path: Path) -> None:
    file, change = FILES[name]
    folder = copied(theirs, tmp_path / "x")
    change(folder / file)
    for what in (lambda: source(folder), lambda: verify(folder, against=theirs, runtime=False)):
        with pytest.raises((UserError, VerifyError), match=r"x|config"):
            what()


def test_gguf_tensors_that_share_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    llama_gguf(file, GGMLQuantizationType.Q4_0)
    fields = {t.name: t.field for t in GGUFReader(file, "r+").tensors}
    one, other = (fields[f"blk.{i}.ffn_up.weight"].parts[-1] for i in (0, 1))
    one[:] = other
    mapped: Any = one.base
    mapped.flush()
    with pytest.raises(VerifyError, match=r"the tensors blk.*ffn_up.weight overlap"):
        source(file)


def test_any_bit_of_a_gguf_header(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    llama_gguf(file, GGMLQuantizationType.Q4_0)
    whole = file.read_bytes()
    chance = random.Random(0)
    for _ in range(12):
        at = chance.randrange(700) if chance.random() < 0.7 else chance.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        with contextlib.suppress(UserError, VerifyError):
            source(file)


def test_more_layers_than_tensors(theirs: Path, tmp_path: Path) -> None:
    """Which would take hours to build."""
    folder = copied(theirs, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(changed(config, ("num_hidden_layers",), 10**9))
    with pytest.raises(UserError, match="1000000000 layers, and"):
        source(folder)
    file = tmp_path / "x.gguf"
    llama_gguf(file, GGMLQuantizationType.Q4_0)
    count = GGUFReader(file, "r+").fields["llama.block_count"].parts[-1]
    count[:] = 10**9
    mapped: Any = count.base
    mapped.flush()
    with pytest.raises(VerifyError, match="1000000000 layers, in"):
        source(file)


def test_zeros_that_the_model_has_no_place_for(theirs: Path, tmp_path: Path) -> None:
    """Only AutoGPTQ's biases of zeros are left out."""
    folder = copied(theirs, tmp_path / "x")
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({**stored, "more.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no parameter more\.weight"):
        source(folder)
