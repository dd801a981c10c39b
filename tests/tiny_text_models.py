"""Tiny models, tokenizers of every kind and hand-made Frozen objects for the export tests."""

import argparse
import inspect
import json
import textwrap
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import generate_merges
from transformers.pytorch_utils import Conv1D

from qat.affine import choose_qparams, quantize
from qat.frozen import Frozen, FrozenWeight
from qat.scheme import QuantSpec

VOCAB = 512
CORPUS = [inspect.getsource(m) for m in (json.decoder, textwrap, argparse)]
INT4 = QuantSpec(qtype="int4", block=(1, 32), range="signed_max")
INT8 = QuantSpec(qtype="int8", block=(1, 32))

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_HEAD + numbers + _TAIL), "isolated"), _BYTES])


BYTE_LEVEL = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "smaug-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def byte_level_tokenizer(kind: str = "gpt-2", bos: bool = False) -> Tokenizer:
    """A trained byte-level BPE; Llama 3's also puts a begin token first."""
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tok.pre_tokenizer = BYTE_LEVEL[kind]()
    tok.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tok.normalizer = normalizers.NFC()
    specials = ["<|endoftext|>", "<|begin|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        tok.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    return tok


def sentencepiece_tokenizer(prefix: str) -> Tokenizer:
    """Llama 2's kind: bytes as fallback, merges derived from scores exactly as transformers' converter derives them.

    prefix: "prepend" (Llama 2's normalizer), "first" (Metaspace, as transformers writes it now), "never", or "gemma":
    no space before the text, and runs of spaces and newlines that are user-defined tokens.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=VOCAB - 259, show_progress=False))
    pieces = json.loads(trained.to_str())["model"]
    merged = [left + right for left, right in pieces["merges"]]
    order = {piece: rank for rank, piece in enumerate(dict.fromkeys(merged))}
    singles = sorted(p for p in pieces["vocab"] if p not in order)
    runs = [c * n for c in "\n▁" for n in range(1, 6) if c * n != "▁"] if prefix == "gemma" else []
    order, singles = {t: r for t, r in order.items() if t not in runs}, [t for t in singles if t not in runs]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *runs, *order, *singles]
    vocab = {text: i for i, text in enumerate(texts)}
    pairs = [(t[:i], t[i:]) for t in order for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    pairs.sort(key=lambda p: (order[p[0] + p[1]], len(p[0]), len(p[1])))
    if runs:
        pairs = generate_merges(vocab, {**dict.fromkeys(runs, 0.0), **{t: -1.0 - r for t, r in order.items()}})
    tok = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "gemma":
        tok.normalizer = normalizers.Replace(" ", "▁")
        tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tok.add_tokens([AddedToken(t, normalized=False) for t in runs])
    elif prefix == "prepend":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def tokenizer_files(tok: Tokenizer, **settings: Any) -> dict[str, bytes]:
    return {"tokenizer.json": tok.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def tiny(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random two-layer model whose norms and biases are not 1 and 0."""
    torch.manual_seed(0)
    if model_type == "gpt2":
        shape: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    else:
        shape = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
        }
        known = AutoConfig.for_model(model_type)
        shape = {key: value for key, value in shape.items() if hasattr(known, key)}
    tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{**shape, **tokens, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def freeze(model: PreTrainedModel, tokenizer: dict[str, bytes], linear: QuantSpec = INT4) -> Frozen:
    """Linear weights on `linear`, token embedding (and an untied head) on int8, the rest float; model unchanged."""
    weights: dict[str, FrozenWeight] = {}
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        module = modules[name.rpartition(".")[0]]
        kind = "Embedding" if isinstance(module, nn.Embedding) else type(module).__name__
        if p.ndim != 2 or "wpe" in name:
            continue
        spec = INT8 if isinstance(module, nn.Embedding) or "lm_head" in name else linear
        x = p.detach().t() if isinstance(module, Conv1D) else p.detach()
        weights[name] = FrozenWeight(quantize(x, choose_qparams(x, spec), spec), kind, tuple(p.shape))
    floats = {name: p.detach().clone() for name, p in parameters.items() if name not in weights}
    embedding = next(n for n in parameters if n.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight")))
    ties = {} if "lm_head.weight" in parameters else {"lm_head.weight": embedding}
    return Frozen(weights, floats, ties=ties, config={**model.config.to_dict(), "name": "tiny"}, tokenizer=tokenizer)
