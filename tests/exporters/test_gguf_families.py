"""Families' options (rotations, windows, caps, ties) with float weights in real llama.cpp, and what is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_text_models import INT8, VOCAB, byte_level_tokenizer, freeze, tiny, tokenizer_files

from qat.auditing import audit
from qat.exporters import export as write
from qat.exporters.gguf import as_held, export, read, refuse, refuse_text
from qat.files import MANIFEST
from qat.frozen import Frozen
from qat.modules.gelu import tanh_form, use_table_gelu
from qat.scheme import Rule, Scheme
from qat.verification import verify

END = "<|endoftext|>"
NORM = "model.norm.weight"
LOCAL = {"rope_type": "default", "rope_theta": 300.0}
EVERY_SECOND = {"num_hidden_layers": 3, "sliding_window": 8, "query_pre_attn_scalar": 16}
SECOND_OF_THREE = ["sliding_attention", "full_attention", "sliding_attention"]
LONG = {"rope_type": "longrope", "short_factor": [1.0 + i / 4 for i in range(8)], "long_factor": [9.0] * 8}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {"rope_theta": 1000.0, "factor": 4.0, **LONG},
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 1024,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2 caps": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 window": ("gemma2", EVERY_SECOND),
    "gemma3 window": ("gemma3_text", {**EVERY_SECOND, "layer_types": SECOND_OF_THREE}),
    "gemma3 rotations": (
        "gemma3_text",
        {
            **EVERY_SECOND,
            "layer_types": SECOND_OF_THREE,
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
    ),
    "phi grouped": ("phi", {"num_key_value_heads": 2, "rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5}}),
    "phi3 grouped": ("phi3", {}),
    "phi3 tied, partial": (
        "phi3",
        {"tie_word_embeddings": True, "rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5}},
    ),
    "phi3 long": ("phi3", LONGROPE),
    "gpt_neox": ("gpt_neox", {"hidden_act": "gelu"}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": LOCAL}),
}


def files() -> dict[str, bytes]:
    return tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END)


def floats(model: Any) -> Frozen:
    return Frozen({}, dict(model.named_parameters()), config=model.config.to_dict(), tokenizer=files())


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_models_in_llama_cpp(variant: str, tmp_path: Path) -> None:
    """Log-probabilities after 12 tokens agree to 2e-5. With llama.cpp's GELU a value between two float16 may go to
    the other one, which shifts that prompt by up to 1e-3: then half of them must agree."""
    pytest.importorskip("xllamacpp")
    from qat.runtimes import llama_cpp

    kind, changes = VARIANTS[variant]
    model = tiny(kind, **changes)
    table = use_table_gelu(model)
    export(floats(model), tmp_path)
    prompts = torch.randint(2, VOCAB, (8, 12))
    with torch.no_grad():
        want = model(prompts).logits.log_softmax(-1)[:, -1]
    error = (llama_cpp.logprobs(tmp_path, prompts.tolist()) - want).abs().amax(-1)
    assert (error < 2e-5).sum() >= (4 if table else 8), error
    assert error.max() < 2e-3


def test_norms_that_the_file_holds_as_one_more(tmp_path: Path) -> None:
    """Gemma's file holds float32(1 + w), the number that the model multiplies with: many w have the same one, and
    what is read back is one of these."""
    model = tiny("gemma")
    w = dict(model.named_parameters())[NORM].data
    w[:6] = torch.tensor([1e-9, -1e-9, 3.0000002, -1.0000001, 1e6, -0.3])
    frozen = floats(model)
    export(frozen, tmp_path)
    held = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["output_norm.weight"]
    assert torch.equal(torch.from_numpy(held.copy()), 1.0 + w)
    got = read(tmp_path)
    assert got.digests() == as_held(frozen).digests()
    assert as_held(got).digests() == got.digests()
    assert torch.equal(1.0 + got.floats[NORM], 1.0 + w)
    assert not torch.equal(got.floats[NORM], w)
    frozen.floats[NORM] = torch.nextafter(1.0 + w, torch.tensor(9.0)) - 1  # one unit in the last place of the file
    assert as_held(frozen).digests()[NORM] != got.digests()[NORM]


def test_verify_compares_with_what_the_file_can_say(tmp_path: Path) -> None:
    """A Gemma of bfloat16 is proven by its manifest alone and against what was frozen; a norm moved by the smallest
    step that the file can show is found both ways."""
    frozen = freeze(tiny("gemma").bfloat16(), files())
    frozen.save(tmp_path / "frozen")
    path = write(frozen, "gguf", tmp_path / "gguf")
    for against in (None, tmp_path / "frozen"):
        verdict = verify(path, against=against, runtime=False)
        assert verdict.differences == []
        assert not [said for said in verdict.unchecked if "another form" in said]
    held = as_held(frozen).floats[NORM] + 1
    frozen.floats[NORM] = torch.nextafter(held, torch.tensor(9.0)) - 1
    moved = write(frozen, "gguf", tmp_path / "moved")
    assert verify(moved, runtime=False).differences == []
    assert (
        f"{NORM}: the unquantized values differ"
        in verify(moved, against=tmp_path / "frozen", runtime=False).differences[0]
    )
    manifests = [json.loads((folder / MANIFEST).read_text()) for folder in (moved, path)]
    (moved / MANIFEST).write_text(json.dumps({**manifests[0], "tensors": manifests[1]["tensors"]}))
    assert verify(moved, runtime=False).differences == [f"{NORM}: not the tensor whose digest is in the manifest"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_audit_lets_every_parameter_through(variant: str) -> None:
    kind, changes = VARIANTS[variant]
    model = tiny(kind, **changes)
    everything = [Rule(scheme=Scheme(weight=INT8), type="Linear|Embedding")]
    audited = audit(model, everything, targets=["gguf"], config=tanh_form(model.config.to_dict()))
    left = [row.name for row in audited.rows if row.spec is None and len(row.shape) == 2]
    assert left == []


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt_neox", {"hidden_act": "gelu"}, "computes gelu_new, not gelu; train with that (gelu: float16_table"),
        ("gpt_neox", {"attention_bias": False}, "wants biases in attention"),
        ("gpt_neox", {"tie_word_embeddings": True}, "wants a head of its own; set tie_word_embeddings to false"),
        ("phi", {"qk_layernorm": True}, "knows no qk_layernorm"),
        ("phi", {"hidden_act": "relu"}, "computes gelu_new, not relu"),
        ("phi3", {"head_dim": 32}, "together are hidden_size wide"),
        ("gemma", {"attention_bias": True}, "knows no attention_bias"),
        ("gemma", {"tie_word_embeddings": False}, "takes the head from the embedding; set tie_word_embeddings to true"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "divides by sqrt(16), not by that of 32"),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}, "divides by sqrt(16), not by that of 32"),
        ("gemma2", {"final_logit_softcapping": None}, "always has final_logit_softcapping"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "full attention in every n-th layer"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "knows no final_logit_softcapping"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {**LOCAL, "rope_type": "linear", "factor": 2.0}}},
            "only the default rope type in its sliding layers",
        ),
        ("qwen2", {"rope_parameters": {**LOCAL, "rope_type": "llama3"}}, "does not know rope type llama3 for qwen2"),
        ("llama", {"rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5}}, "does not know partial rotary"),
    ],
)
def test_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    config = tiny(kind, **({"query_pre_attn_scalar": 16} if kind in ("gemma2", "gemma3_text") else {})).config.to_dict()
    config |= {"hidden_act": "gelu_new"} if kind == "gpt_neox" else {}
    assert refuse(NORM, "", (64,), None, config) in (None, f"llama.cpp's {kind} has no tensor for {NORM}")
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    assert reason in str(refuse(NORM, "", (64,), None, config))


def test_lengths_of_text() -> None:
    """Gemma's windows are llama.cpp's own; Phi 3's are not, and its long factors depend on the context's size."""
    assert refuse_text(5000, tiny("gemma2", sliding_window=16).config.to_dict()) is None
    assert "sliding window of 16 tokens" in str(refuse_text(17, tiny("phi3", sliding_window=16).config.to_dict()))
    long = tiny("phi3", **LONGROPE).config.to_dict()
    assert refuse_text(248, long) is None
    assert "larger than 256 tokens" in str(refuse_text(249, long))
