"""GGUF files against the gguf package's own decoder, transformers' GGUF reader and real llama.cpp."""

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text_models import INT4, INT8, VOCAB, byte_level_tokenizer, freeze, tiny, tokenizer_files
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.pytorch_utils import Conv1D

from qat.errors import UserError, VerifyError
from qat.exporters import read_any, refuse_texts
from qat.exporters.gguf import FILE, as_held, export, gguf_file, read, refuse
from qat.frozen import Frozen
from qat.runtimes import llama_cpp
from qat.scheme import QuantSpec

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama own head size": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # transformers' GGUF reader assumes this size
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"head_dim": 256}),  # of the published models; transformers' reader assumes it
    "gemma3": ("gemma3_text", {"head_dim": 256}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {"hidden_act": "gelu_new"}),
}


END = "<|endoftext|>"


def files() -> dict[str, bytes]:
    return tokenizer_files(byte_level_tokenizer(), bos_token=END, eos_token=END, pad_token=END)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Frozen, Path]:
    """A model, what was frozen of it, and the folder with its GGUF file."""
    model_type, changes = MODELS[request.param]
    model = tiny(model_type, **changes)
    frozen = freeze(model, files())
    path = tmp_path_factory.mktemp("gguf")
    export(frozen, path)
    model.load_state_dict(as_held(frozen).state_dict())  # from here on the model is what the file must hold
    return model, frozen, path


def test_read_gives_back_what_was_frozen(exported: tuple[Any, Frozen, Path]) -> None:
    _, frozen, path = exported
    got = read(path)
    assert got.digests() == as_held(frozen).digests()
    assert got.ties == frozen.ties
    assert {n: (w.kind, w.shape) for n, w in got.weights.items()} == {
        n: (w.kind, w.shape) for n, w in frozen.weights.items()
    }
    for key, value in got.config.items():
        if frozen.config.get(key) is not None:
            assert value == (pytest.approx(frozen.config[key]) if isinstance(value, float) else frozen.config[key]), key


def test_transformers_reads_the_same_model(exported: tuple[Any, Frozen, Path]) -> None:
    """Its GGUF reader, its name tables, its permutation, its dequantization and its reading of the metadata."""
    model, _, path = exported
    if getattr(model.config, "attention_bias", False):
        pytest.skip("transformers' GGUF reader does not know that a Llama has biases")
    if model.config.model_type in ("gemma", "phi", "gpt_neox"):
        pytest.skip("transformers' GGUF reader does not know this family")
    config = AutoConfig.from_pretrained(path, gguf_file="model.gguf")
    theirs = AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(path / "model.gguf", return_tensors=True, model_to_load=theirs)["tensors"]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert theirs.load_state_dict(tensors, strict=False).missing_keys == sorted(tied)
    ours = model.state_dict()
    assert set(tensors) | tied == set(ours)
    for name, value in tensors.items():
        assert torch.equal(value, ours[name]), name
    prompts = torch.randint(2, VOCAB, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompts).logits, model(prompts).logits, atol=1e-4, rtol=0)


def int8_blocks(x: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's x86 kernels make of the input of a quantized matmul: int8 per 32, half-even, f16 scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(amax == 0, 0.0, blocks * (127 / amax)).round()
    return (codes * (amax / 127).half().float()).reshape(x.shape)


class TableGelu(nn.Module):
    """llama.cpp's CPU GELU: a table from float16 to float16, outside of -10..10 the identity or zero (ggml vec.h)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.half().float()
        y = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h * h)))
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y.half().float()))


def simulated(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, T, V] of the float model as llama.cpp computes it: int8 inputs of linear layers, GELU."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda _, args: (int8_blocks(args[0]), *args[1:]))
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, TableGelu())
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)


def test_llama_cpp_computes_what_was_trained(exported: tuple[Any, Frozen, Path]) -> None:
    """With llama.cpp's int8 activations (and, for GPT-2, its GELU table) simulated in torch, the log-probabilities of
    all tokens agree to 1e-5; without them they do not, so nothing but these steps differs.

    The steps are chaotic at the last bit: a value on a rounding boundary may flip a code and shift one prompt by up
    to 1e-2. So most of the short prompts must agree, not all; a wrong weight would spoil every one.
    """
    pytest.importorskip("xllamacpp")

    model, _, path = exported
    torch.manual_seed(1)
    prompts = torch.randint(2, VOCAB, (8, 6))
    got = llama_cpp.logprobs(path, prompts.tolist())
    with torch.no_grad():
        plain = model(prompts).logits.log_softmax(-1)[:, -1]
    error = (got - simulated(model, prompts)[:, -1]).abs().amax(-1)
    assert (error < 1e-5).sum() >= 6, error
    assert error.max() < 0.05
    assert ((got - plain).abs().amax(-1) > 1e-3).all()


def test_float16_and_unquantized_matrices(tmp_path: Path) -> None:
    """float16 matrices stay float16, everything else is float32; a model without any quantized weight works too."""
    model = tiny("llama").half()
    frozen = freeze(model, files())
    frozen.floats |= {n: p for n, p in model.state_dict().items() if "mlp" in n or "lm_head" in n}
    frozen.weights = {n: w for n, w in frozen.weights.items() if n not in frozen.floats}
    export(frozen, tmp_path)
    got = read(tmp_path)
    for name, value in frozen.floats.items():
        assert got.floats[name].dtype == (torch.float16 if value.ndim == 2 else torch.float32)
        assert torch.equal(got.floats[name].float(), value.float())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_long_context_rotations_in_llama_cpp(rope: dict[str, Any], tmp_path: Path) -> None:
    """Float weights, so nothing but the rotation could differ; 60 tokens go beyond the original context of 32."""
    pytest.importorskip("xllamacpp")

    model = tiny("llama", rope_parameters={"rope_theta": 500.0, **rope}, max_position_embeddings=128)
    export(Frozen({}, dict(model.named_parameters()), config=model.config.to_dict(), tokenizer=files()), tmp_path)
    prompts = torch.randint(2, VOCAB, (2, 60))
    with torch.no_grad():
        want = model(prompts).logits.log_softmax(-1)[:, -1]
    torch.testing.assert_close(llama_cpp.logprobs(tmp_path, prompts.tolist()), want, atol=2e-5, rtol=0)


GPT2_CONFIG = {"model_type": "gpt2", "n_layer": 1}
LINEAR = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (INT4, None),
        (INT8, None),
        (replace(INT4, scale="float16"), None),
        (None, None),
        (replace(INT4, block=(1, 64)), r"block is \(1, 64\); .* Q4_0: symmetric int4, block \(1, 32\)"),
        (replace(INT4, scale="bfloat16"), "scales are bfloat16; the nearest .* float16 or portable"),
        (QuantSpec(qtype="uint4", block=(1, 32), range="minmax", offset="zero_point"), "offset .zero_point.; .* Q4_1"),
        (QuantSpec(qtype="int3", block=(1, 32)), "codes are int3; the nearest GGUF grid is Q4_0: symmetric int4"),
        (QuantSpec(qtype="int6", block=(1, 32)), "codes are int6; the nearest GGUF grid is Q8_0: symmetric int8"),
        (QuantSpec(qtype="int8"), r"block is \(1, -1\)"),
    ],
)
def test_refused_grids(spec: QuantSpec | None, reason: str | None) -> None:
    said = refuse(LINEAR, "Conv1D", (64, 256), spec, GPT2_CONFIG)
    if reason is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(reason, said), said


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("transformer.wpe.weight", GPT2_CONFIG, "keeps transformer.wpe.weight in floating point"),
        ("transformer.h.1.mlp.c_fc.weight", GPT2_CONFIG, "has no tensor for transformer.h.1"),
        (LINEAR, {**GPT2_CONFIG, "activation_function": "relu"}, "computes gelu_new, not relu"),
        (LINEAR, {"model_type": "bloom"}, "qwen2, qwen3, gemma, gemma2, gemma3_text, phi, phi3, gpt_neox, not bloom"),
        ("model.norm.weight", {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "gelu"}, "silu, not gelu"),
        (
            "model.norm.weight",
            {"model_type": "llama", "num_hidden_layers": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type dynamic",
        ),
    ],
)
def test_refused_models(name: str, config: dict[str, Any], reason: str) -> None:
    assert reason in str(refuse(name, "", (64, 64), INT4, config))


def test_texts_beyond_a_sliding_window_are_refused() -> None:
    """Before training: llama.cpp would attend to all of them, and its context ends there."""
    windowed = tiny("mistral", sliding_window=16).config.to_dict()
    refuse_texts(["hf", "gguf"], 16, windowed)
    refuse_texts(["hf"], 17, windowed)
    refuse_texts(["gguf"], 17, tiny("mistral", sliding_window=None).config.to_dict())
    with pytest.raises(UserError, match=r"export to gguf: .* window of 16 tokens.*give data\.block_size=16 or less"):
        refuse_texts(["hf", "gguf"], 17, windowed)


def test_export_refuses_what_refuse_refuses(tmp_path: Path) -> None:
    frozen = freeze(tiny("llama"), files(), linear=QuantSpec(qtype="int4"))
    with pytest.raises(UserError, match=r"q_proj.weight: block is \(1, -1\)"):
        export(frozen, tmp_path)


def test_a_damaged_file_is_a_verification_failure(tmp_path: Path) -> None:
    export(freeze(tiny("gpt2"), files()), tmp_path)
    whole = (tmp_path / "model.gguf").read_bytes()
    key = whole.index(b"gpt2.embedding_length")
    renamed = whole[:key] + b"x" + whole[key + 1 :]
    for damaged in (b"not a model", whole[:1000], whole[:-200_000], renamed):
        (tmp_path / "model.gguf").write_bytes(damaged)
        with pytest.raises(VerifyError, match="cannot be decoded"):
            read_any(tmp_path)


def test_model_gguf_is_meant_by_its_folder_for_reader_and_runtime_alike(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 \.gguf files"):
        gguf_file(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"has 2 \.gguf files; name one file"):
        gguf_file(tmp_path)
    (tmp_path / FILE).touch()
    assert gguf_file(tmp_path) == tmp_path / FILE
    assert gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert llama_cpp.gguf_file is gguf_file
