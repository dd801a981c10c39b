"""The models that benchmarks/parity.py puts on each target's grid: the embedded ones and random Llamas."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qat.data.stdlib import StdlibData
from qat.models.load import EMBEDDED, load
from qat.shipping import tokenizer_files

WINDOWS, RANDOM_WINDOWS = 16, 4  # of 256 tokens


class Subject(NamedTuple):
    """A float model, its tokenizer's files, and text to score."""

    name: str
    model: Any
    files: dict[str, bytes]
    batch: dict[str, Tensor]


def embedded(name: str) -> Subject:
    loaded = load(None, name=name)
    data = StdlibData(block_size=256, batch_size=8)
    data.attach(loaded.tokenizer)
    return Subject(name, loaded.model, tokenizer_files(loaded.tokenizer), data.evaluation("test", WINDOWS))


EVEN = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 4096}
ODD = {"hidden_size": 320, "intermediate_size": 704, "head_dim": 80, "vocab_size": 4099}
RANDOM: dict[str, tuple[dict[str, int], torch.dtype, bool]] = {
    "random Llama, float32": (EVEN, torch.float32, False),
    "random Llama, bfloat16, tied": (EVEN, torch.bfloat16, True),
    "random Llama, odd shapes": (ODD, torch.float32, False),
}


def random_llama(name: str, like: Subject) -> Subject:
    """Two layers, grouped heads, norms that are not 1; weights exact in their dtype, as in a checkpoint of it."""
    shape, dtype, tied = RANDOM[name]
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = LlamaConfig(
        **shape, **heads, num_hidden_layers=2, bos_token_id=0, eos_token_id=0, max_position_embeddings=512
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.1 * torch.randn_like(p)).mul(0.5).to(dtype))
    return Subject(name, model, like.files, {k: v[:RANDOM_WINDOWS] for k, v in like.batch.items()})


def subjects(names: list[str]) -> list[Subject]:
    """Those called so; of all models where the list is empty."""
    found = [embedded(name) for name in EMBEDDED]
    found += [random_llama(name, found[0]) for name in RANDOM]
    return [s for s in found if not names or s.name in names]
