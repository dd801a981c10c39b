"""Any export against any other, and what is injected into one tensor of each: named, with its effect, exit code 3."""

from pathlib import Path

import pytest
from prepared_models import INT4, rule
from tiny_text_models import byte_level_tokenizer, tiny, tokenizer_files

from qat.conversion import convert, prepare
from qat.exporters import export
from qat.verification import verify

FOLDERS = ["hf", "gptq", "awq", "mlx", "torchao"]
KINDS = ["gguf", "onnx", *FOLDERS]
END = "<|endoftext|>"
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral's int4 weights in every format, as others' tools leave them: without our manifest."""
    pytest.importorskip("torchao")
    model = tiny("mistral", tie_word_embeddings=False, intermediate_size=128, sliding_window=None)
    model.config.architectures = [type(model).__name__]
    files = tokenizer_files(byte_level_tokenizer("smaug-bpe"), bos_token=END, eos_token=END, unk_token=END)
    frozen = convert(prepare(model, [rule(None, "lm_head"), rule(INT4)]), tokenizer=files)
    path = tmp_path_factory.mktemp("pairs")
    frozen.save(path / "run" / "frozen")
    for kind in KINDS:
        export(frozen, kind, path / kind)
        (path / kind / "manifest.json").unlink()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_equal(kind: str, root: Path) -> None:
    for other in [*KINDS, "run", "run/frozen"]:
        verdict = verify(root / kind, against=root / other, runtime=False)
        assert verdict.differences == [], other
        assert verdict.figures["codes_equal"] is verdict.figures["weights_equal"] is True, other
