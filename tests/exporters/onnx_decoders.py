"""Tiny prepared decoders, and what the ONNX tests compare of them and their files."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_text_models import VOCAB, byte_level_tokenizer, tiny, tokenizer_files
from torch import Tensor, nn

from qat.conversion import calibrate, convert, freeze_observers, prepare
from qat.frozen import Frozen
from qat.quantizers.bias import round_biases
from qat.runtimes.ort_text import Decoder
from qat.scheme import Rule

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "odd": ("llama", {"hidden_size": 48, "head_dim": 12, "intermediate_size": 80, "vocab_size": 509}),
}


def prepared(name: str, given: Sequence[Rule], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Frozen]:
    """A prepared (and calibrated) model that computes in float32, from master weights of `dtype`, and its codes."""
    kind, changes = MODELS[name]
    model = prepare(tiny(kind, **changes).to(dtype).float(), given).eval()
    if any(rule.scheme is not None and rule.scheme.static for rule in given):
        calibrate(model, [tokens(4, 32, seed) for seed in range(100, 104)], lambda m, ids: m(input_ids=ids))
        freeze_observers(model)
        round_biases(model)
    return model, convert(model, tokenizer=tokenizer_files(byte_level_tokenizer()))


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB - 3, (rows, columns), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def apart(have: np.ndarray, want: Tensor) -> float:
    """The largest difference over the largest logit."""
    return float(np.abs(have - want.numpy()).max() / want.abs().max())


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [R, n] -> [R, n * 8 / bits], the low bits first: all that a reader has to know of the packing."""
    return np.stack([(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).reshape(len(data), -1)


def check_short_prompts(model: nn.Module, folder: Path) -> None:
    """With int8 inputs one flipped code decorrelates the rest, so many short prompts: a third within 2e-6, and the
    median no more than the simulation's own spread between sums in float32 and in float64."""
    decoder, double = Decoder(folder), copy.deepcopy(model).double()
    found, spread = [], []
    for seed in range(56):
        ids = tokens(1, 8 + seed % 5, seed)
        want = logits(model, ids)
        found.append(apart(decoder.step(ids.numpy())[0], want))
        spread.append(apart(logits(double, ids).numpy(), want))
    assert sum(f <= 2e-6 for f in found) >= len(found) / 3, sorted(found)
    # where hardly a code flips, both medians are the rounding of float sums, which 2e-6 bounds
    assert np.median(found) <= max(np.median(spread), 2e-6), (np.median(found), np.median(spread))
