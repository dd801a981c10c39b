"""The arithmetic of benchmarks/file_sizes.py, on real exports, against what ggml and compressed-tensors say of them."""

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from prepared_models import INT4, prepared, rule
from tiny_text_models import byte_level_tokenizer, freeze, tiny, tokenizer_files

from qat.exporters import export


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_ggml_bits_for_each_weight(tmp_path: Path) -> None:
    from file_sizes import measure

    made = freeze(tiny("llama", tie_word_embeddings=True), tokenizer_files(byte_level_tokenizer()))
    found = measure(export(made, "gguf", tmp_path / "gguf"), made)
    bits = {name: 8 * size / count for name, (count, size) in GGML_QUANT_SIZES.items()}
    embedding = made.weights["model.embed_tokens.weight"].tensor.codes.numel()
    want = bits[GGMLQuantizationType.Q4_0] * (found.quantized - embedding) + bits[GGMLQuantizationType.Q8_0] * embedding
    assert found.bits_quantized == pytest.approx(want / found.quantized, rel=1e-12)
    assert found.floats == sum(t.numel() * 4 for t in made.floats.values())
    assert found.other is not None
    assert 0 < found.other < found.file - found.codes


def test_embedding_left_in_float_limits_the_file(tmp_path: Path) -> None:
    from file_sizes import measure

    _, made = prepared("llama", [rule(None, "lm_head"), rule(INT4)], tie_word_embeddings=True)
    path = export(made, "hf", tmp_path / "hf")
    found = measure(path, made)
    words = sum(w.tensor.codes.numel() // 8 * 4 + w.tensor.scale.nbytes + 2 * 8 for w in made.weights.values())
    assert found.bits_quantized == pytest.approx(8 * words / found.quantized)  # int32 words, scales, an int64 shape
    assert found.floats == sum(t.numel() * 4 for t in made.floats.values())
    assert found.file == (path / "model.safetensors").stat().st_size
    assert found.folder == sum(f.stat().st_size for f in path.iterdir())
    assert found.smaller == pytest.approx(32 / found.bits)
    assert found.smaller < 4 * found.weights / found.floats


def test_compiled_files_are_not_taken_apart(tmp_path: Path) -> None:
    from file_sizes import measure

    _, made = prepared("llama", [rule(None, "lm_head"), rule(INT4)], tie_word_embeddings=True)
    (tmp_path / "model.pte").write_bytes(bytes(1000))
    found = measure(tmp_path, made)
    assert (found.file, found.bits_quantized, found.floats, found.other) == (1000, None, None, None)
