"""A GGUF file alone gives back the whole model: every family and kind of rotary positions, and its tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text_models import byte_level_tokenizer, freeze, sentencepiece_tokenizer, tiny, tokenizer_files
from transformers import AutoConfig, AutoModelForCausalLM

from qat import tokenizer_diagnosis
from qat.errors import UserError
from qat.exporters import export
from qat.exporters.gguf import as_held
from qat.exporters.gguf_models import read_rope
from qat.rescue import source

END = "<|endoftext|>"
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 16, "factor": 4.0}
LONG |= {"short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
SLIDING = {"rope_type": "default", "rope_theta": 50.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_inner": 128}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "llama 3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2 yarn, tied": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": SLIDING,
            },
        },
    ),
    "phi": ("phi", {}),
    "phi3 partial": ("phi3", {"rope_parameters": {**SLIDING, "partial_rotary_factor": 0.5}}),
    "phi3 long": ("phi3", {"original_max_position_embeddings": 16, "rope_parameters": LONG}),
    "gpt_neox": ("gpt_neox", {"hidden_act": "gelu_new", "use_parallel_residual": False}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    model = tiny(kind, **changes, **({"vocab_size": 544} if kind.startswith("gemma") else {}))
    files = tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, unk_token=END)
    if kind.startswith("gemma"):
        files = tokenizer_files(sentencepiece_tokenizer("gemma"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        files = {n: c.replace(b"</s>", b"<eos>").replace(b"<s>", b"<bos>") for n, c in files.items()}
    frozen = freeze(model, files)
    path = export(frozen, "gguf", tmp_path / "out")
    (path / "manifest.json").unlink()
    model.load_state_dict(as_held(frozen).state_dict())
    found = source(path)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found.config)).eval()
    again.load_state_dict(found.state_dict())
    ids = torch.randint(2, 500, (1, 14 if "long" in name else 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert tokenizer_diagnosis.difference(found.tokenizer, files) is None


@pytest.mark.parametrize(
    ("fields", "tensors", "says"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_beta_fast": 3.0}, {}, "yarn_beta_fast"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "longrope"),
        ({"llama.rope.dimension_count": 8}, {}, "rotates 0.5 of each head"),
        ({}, {"rope_freqs.weight": torch.linspace(1, 8, 8)}, "not Llama 3's"),
        ({}, {"rope_factors_long.weight": torch.ones(8)}, "rope_factors_long"),
    ],
)
def test_positions_that_cannot_be_told_are_refused(fields: dict[str, Any], tensors: dict[str, Any], says: str) -> None:
    shape = {"llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.rope.scaling.factor": 2.0}
    with pytest.raises(UserError, match=says):
        read_rope({"general.architecture": "llama", **shape, **fields}, tensors)
