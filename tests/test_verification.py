"""Damage that no manifest tells of: verify still finds it, from the tensors and the tokenizer themselves."""

import contextlib
import json
import random
from pathlib import Path

import pytest
from prepared_models import ALL, prepared

from qat.errors import UserError, VerifyError
from qat.exporters import export
from qat.frozen import Frozen
from qat.packed.load import load
from qat.verification import verify


@pytest.fixture(scope="module")
def frozen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen GPT-2 with a tokenizer file."""
    _, frozen = prepared("gpt2", ALL)
    frozen.tokenizer["tokenizer.json"] = b'{"model": {"vocab": {"a": 0, "b": 1}}}'
    path = tmp_path_factory.mktemp("frozen") / "frozen"
    frozen.save(path)
    return path


@pytest.fixture
def folder(frozen_folder: Path, tmp_path: Path) -> Path:
    """Its Hugging Face export, without the manifest."""
    path = export(Frozen.load(frozen_folder), "hf", tmp_path / "hf")
    (path / "manifest.json").unlink()
    return path


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_file_without_its_manifest_says_what_it_could_not_check(folder: Path, frozen_folder: Path) -> None:
    verdict = verify(folder, against=frozen_folder, runtime=False)
    assert verdict.differences == []
    assert verdict.figures["codes_equal"] is verdict.figures["weights_equal"] is True
    assert any("no manifest.json" in line for line in verdict.unchecked)
    assert any("nothing to compare with" in line for line in verify(folder, runtime=False).unchecked)


def test_any_flipped_bit_of_the_weights_is_caught(folder: Path, frozen_folder: Path) -> None:
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    chosen = random.Random(0)
    for _ in range(40):
        bit = chosen.randrange(8 * header, 8 * file.stat().st_size)
        flip(file, bit)
        verdict = verify(folder, against=frozen_folder, runtime=False)
        assert verdict.differences, f"bit {bit}"
        with pytest.raises(VerifyError, match=r"transformer\."):
            verdict.raise_if_different()
        flip(file, bit)
    assert not verify(folder, against=frozen_folder, runtime=False).differences


def test_another_tokenizer_is_caught(folder: Path, frozen_folder: Path) -> None:
    flip(folder / "tokenizer.json", 8 * 24)
    assert "tokenizer.json: not the tokenizer" in verify(folder, against=frozen_folder, runtime=False).differences[0]


def test_any_key_of_the_configuration_with_a_damaged_name_is_caught(folder: Path, frozen_folder: Path) -> None:
    file = folder / "config.json"
    whole = file.read_text()
    for key in Frozen.load(frozen_folder).config.keys() - {"_name_or_path"}:
        file.write_text(whole.replace(f'"{key}":', f'"{key[:-1]}~":'))
        differences = verify(folder, against=frozen_folder, runtime=False).differences
        assert any(f"config {key} is missing" in d for d in differences), key
    file.write_text(whole.replace('"tie_word_embeddings": true', '"tie_word_embeddings": 1.5'))
    assert verify(folder, against=frozen_folder, runtime=False).differences


def test_a_broken_configuration_is_one_message(folder: Path, frozen_folder: Path) -> None:
    file = folder / "config.json"
    text = file.read_text()
    whole = json.loads(text)
    parts = whole["quantization_config"]
    damaged = ["", "3", "[]", "null", "{", json.dumps({**whole, "quantization_config": 3})]
    damaged += [text[:length] for length in range(1, len(text), 997)]
    used = parts.keys() - {"format"}
    damaged += [json.dumps({**whole, "quantization_config": {**parts, key: 7}}) for key in used]
    damaged += [
        json.dumps({**whole, "quantization_config": {k: v for k, v in parts.items() if k != key}}) for key in used
    ]
    damaged += [json.dumps({**whole, key: {"a": []}}) for key in ("n_embd", "n_layer", "model_type", "vocab_size")]
    for text in damaged:
        file.write_text(text)
        with contextlib.suppress(UserError, VerifyError):  # harmless, or one of these; nothing else
            load(folder)
        with pytest.raises((UserError, VerifyError)):
            verify(folder, against=frozen_folder, runtime=False).raise_if_different()
