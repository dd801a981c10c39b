"""The model from scratch: deterministic, within its size, and a folder that transformers loads back exactly."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.data.stdlib import StdlibData
from qat.models.gpt2_mini import END, FromScratch, train_tokenizer
from qat.models.load import Loaded

TEXTS = ["def f(x):\n    return x + 1\n" * 5, "class A:\n\tpass  # größe 数\r\n", "import os\n"] * 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lib")
    for i in range(60):
        (root / f"m{i}.py").write_text(TEXTS[i % 3], newline="")
    return root


def build(library: Path) -> Loaded:
    torch.manual_seed(3)
    source = FromScratch(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, dropout=0.1)
    return source.load(StdlibData(root=str(library), block_size=8, batch_size=1))


def test_seed_and_data_decide_everything(library: Path) -> None:
    one, two = build(library), build(library)
    assert one.tokenizer.backend_tokenizer.to_str() == two.tokenizer.backend_tokenizer.to_str()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_folder_loads_back_exactly(library: Path, tmp_path: Path) -> None:
    loaded = build(library)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = TEXTS[1] + "unseen 𝔘nicode"
    assert tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id == model.config.eos_token_id
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, loaded.model.eval()(ids).logits)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_every_byte_has_a_token() -> None:
    tokenizer = train_tokenizer(["a"], 257)
    assert len(tokenizer) == 257
    text = "".join(map(chr, range(1, 0x250)))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
