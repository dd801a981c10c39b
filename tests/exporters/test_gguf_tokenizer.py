"""llama.cpp must split text as the Hugging Face tokenizer does: compared on a few hundred lines, for every kind."""

import inspect
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_text_models import CORPUS, VOCAB, byte_level_tokenizer, freeze, sentencepiece_tokenizer, tiny, tokenizer_files
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from qat.errors import UserError
from qat.exporters.gguf import export
from qat.exporters.gguf_tokenizer import (
    known_difference,
    pre_tokenizer,
    refuse_tokenizer,
    scores,
    space_prefix,
    swallows_spaces,
    without_user_defined,
)

HARD = [
    "",
    " ",
    "    indented\twith\ttabs\t",
    "trailing spaces   ",
    "a  b   c    d",
    "1 12 123 1234 12345 3.14159 1e-10 0x7F 1,000,000",
    "don't I'll we've they're it's he'd I'm DON'T IT'S",
    "naïve café Ångström ÜBER straße",
    "日本語のテキスト 中文字符 한국어",
    "עברית العربية हिन्दी ไทย",
    "emoji 😀👩‍👩‍👧 ☕️ ✓ → ∑",
    "\u00a0non-breaking\u2003em\u200bzero-width",
    "e\u0301 decomposed",
    "snake_case camelCase kebab-case SCREAMING_CASE __dunder__",
    'f"{x!r:>{width}}" % (a, b) != c //= 2 ** 3 -> None: ...',
    "https://example.org/a/b?c=d&e=f#g user@host",
    "<|endoftext|>after an end<|endoftext|>",
    "½ ² Ⅷ ٣ ४",
    "line\r\nwindows\r\n\r\nblank",
    "\n\n\n",
    " \n  \n\t\n x",
    "x\x00y\x07z",
    "!!!???...,,,;;;",
    "ﬁ ligature ＡＢＣ fullwidth",
]


def lines() -> list[str]:
    """The hard ones, lines of code with their indentation and without, and pieces of several lines."""
    code = [line for text in (*CORPUS, inspect.getsource(json.encoder)) for line in text.splitlines() if line.strip()]
    pieces = ["\n".join(code[i : i + 8]) for i in range(0, 160, 8)]
    some = code[:: len(code) // 200]
    return HARD + some + [line.strip() for line in some] + pieces


def check(tok: Tokenizer, folder: Path, **settings: Any) -> int:
    """Export with this tokenizer, compare all lines; the number of lines that are known to differ."""
    pytest.importorskip("xllamacpp")
    from qat.runtimes import llama_cpp

    files = tokenizer_files(tok, **settings)
    vocab = VOCAB + 16  # more embedding rows than tokens, as many models have
    export(freeze(tiny("llama", vocab_size=vocab), files), folder)
    text = lines()
    same = [line for line in text if known_difference(files, line) is None]
    assert len(same) >= 200
    want = [tok.encode(line, add_special_tokens=False).ids for line in same]
    got = llama_cpp.tokenize(folder, same)
    wrong = [(line, w, g) for line, w, g in zip(same, want, got, strict=True) if w != g]
    assert not wrong, f"{len(wrong)} of {len(same)}: {wrong[:5]}"
    return len(text) - len(same)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level(kind: str, tmp_path: Path) -> None:
    tok = byte_level_tokenizer(kind)
    assert pre_tokenizer(json.loads(tok.to_str())) == kind
    left_out = check(tok, tmp_path, eos_token="<|endoftext|>")
    assert left_out == (1 if kind == "qwen2" else 0)  # one line that is not in NFC


def test_byte_level_with_runs_of_spaces(tmp_path: Path) -> None:
    """GPT-NeoX and Phi 2: tokens that are not special and found before anything else."""
    tok = byte_level_tokenizer("gpt-2")
    tok.normalizer = normalizers.NFC()
    tok.add_tokens([AddedToken(" " * n) for n in range(2, 9)])
    assert pre_tokenizer(json.loads(tok.to_str())) == "gpt-2"
    assert check(tok, tmp_path, eos_token="<|endoftext|>") == 1


@pytest.mark.parametrize("prefix", ["prepend", "first", "never", "gemma"])
def test_sentencepiece(prefix: str, tmp_path: Path) -> None:
    left_out = check(
        sentencepiece_tokenizer(prefix), tmp_path, bos_token="<s>", eos_token="</s>", unk_token={"content": "<unk>"}
    )
    assert (left_out > 0) == (prefix in ("first", "gemma"))  # a space before a space; more spaces than a run has


@pytest.mark.parametrize("swallow", [True, False])
def test_phi3_tokens_swallow_spaces_if_the_tokenizer_says_so(swallow: bool, tmp_path: Path) -> None:
    """llama.cpp decides it by the model's name."""
    tok = sentencepiece_tokenizer("prepend")
    tok.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|user|>", rstrip=swallow)])
    spec = json.loads(tok.to_str())
    end = next(t for t in spec["added_tokens"] if t["content"] == "</s>")
    end |= {"rstrip": swallow, "special": False}
    tok = Tokenizer.from_str(json.dumps(spec))
    files = tokenizer_files(tok, bos_token="<s>", eos_token="<|endoftext|>")
    assert swallows_spaces(files) == swallow
    frozen = freeze(tiny("phi3", vocab_size=VOCAB + 8), files)
    frozen.config["name"] = "none" if swallow else "My-Phi-3"
    export(frozen, tmp_path)
    pytest.importorskip("xllamacpp")
    from qat.runtimes import llama_cpp

    text = ["<|user|>  \n two", "<|user|> a</s>  b", "a <|endoftext|>  b", "plain  words"]
    want = [tok.encode(line, add_special_tokens=False).ids for line in text]
    assert llama_cpp.tokenize(tmp_path, text) == want
    odd = changed(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), added=[AddedToken("<x>", rstrip=True)]
    )
    assert "keeps the spaces around added tokens" in str(known_difference(odd, "a<x> b"))
    assert known_difference(odd, "a b") is None


def fields(tok: Tokenizer, folder: Path, config: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """The tokenizer's metadata in an exported file."""
    frozen = freeze(tiny("llama"), tokenizer_files(tok, **settings))
    frozen.config |= config or {}
    export(frozen, folder)
    found = gguf.GGUFReader(folder / "model.gguf").fields
    return {k.removeprefix("tokenizer."): f.contents() for k, f in found.items() if k.startswith("tokenizer.")}


def test_special_tokens_and_template(tmp_path: Path) -> None:
    """Ids come from tokenizer_config.json, else from config.json; whether encoding adds them, from the tokenizer."""
    tok = byte_level_tokenizer("llama-bpe", bos=True)
    got = fields(tok, tmp_path, bos_token="<|begin|>", eos_token={"content": "<|endoftext|>"}, chat_template="{{ x }}")
    assert (got["ggml.bos_token_id"], got["ggml.eos_token_id"]) == (1, 0)
    assert (got["ggml.add_bos_token"], got["ggml.add_eos_token"]) == (True, False)
    assert got["chat_template"] == "{{ x }}"
    assert got["ggml.token_type"][:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert "ggml.padding_token_id" not in got


def test_special_tokens_from_the_model_config(tmp_path: Path) -> None:
    got = fields(byte_level_tokenizer(), tmp_path, {"eos_token_id": [0, 1], "bos_token_id": 99999})
    assert got["ggml.eos_token_id"] == 0
    assert "ggml.bos_token_id" not in got
    assert (got["ggml.add_bos_token"], got["ggml.add_eos_token"]) == (False, False)


def test_sentencepiece_types(tmp_path: Path) -> None:
    got = fields(sentencepiece_tokenizer("prepend"), tmp_path, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    kinds = gguf.TokenType
    assert got["ggml.token_type"][:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert (got["ggml.model"], got["ggml.add_bos_token"], got["ggml.add_space_prefix"]) == ("llama", True, True)
    assert got["ggml.tokens"][3] == "<0x00>"


def changed(**parts: Any) -> dict[str, bytes]:
    tok = byte_level_tokenizer()
    tok.add_special_tokens(parts.pop("added", []))
    for name, part in parts.items():
        setattr(tok, name, part)
    return tokenizer_files(tok)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), 'its pre-tokenizer {"type": "Whitespace"} is unknown'),
        (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "is unknown to the GGUF export"),
        (changed(normalizer=normalizers.Lowercase()), "knows no Lowercase normalizer"),
        ({"vocab.json": b"{}"}, "no tokenizer.json"),
        (tokenizer_files(Tokenizer(models.WordLevel({"a": 0}, "a"))), "not WordLevel"),
        (tokenizer_files(Tokenizer(models.BPE({"a": 0}, []))), "unknown to the GGUF export"),
    ],
)
def test_refused_before_any_work(files: dict[str, bytes], reason: str) -> None:
    assert reason in str(refuse_tokenizer(files, {"vocab_size": VOCAB}))


def test_more_tokens_than_embedding_rows() -> None:
    said = refuse_tokenizer(tokenizer_files(byte_level_tokenizer()), {"vocab_size": 300})
    assert "has 512 tokens, the model's embedding only 300" in str(said)
    assert refuse_tokenizer(tokenizer_files(byte_level_tokenizer()), {"vocab_size": VOCAB}) is None


def test_merges_that_scores_cannot_say() -> None:
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    assert scores(vocab, [("a", "b"), ("ab", "c"), ("a", "bc")]) == {"ab": 0.0, "abc": -1.0}
    for merges in ([("a", "b"), ("ab", "c")], [("ab", "c"), ("a", "b"), ("a", "bc")]):
        with pytest.raises(UserError, match="cannot be written as SentencePiece scores"):
            scores(vocab, merges)


def test_user_defined_tokens_that_are_not_merged_first() -> None:
    own = {"▁▁"}
    assert without_user_defined([("▁", "▁"), ("a", "b")], own) == [("a", "b")]
    for merges in ([("a", "b"), ("▁", "▁")], [("▁", "▁"), ("▁▁", "a")]):
        with pytest.raises(UserError, match="user-defined tokens otherwise"):
            without_user_defined(merges, own)


def test_other_space_rules_are_refused() -> None:
    spec = json.loads(sentencepiece_tokenizer("first").to_str())
    spec["pre_tokenizer"]["split"] = True
    with pytest.raises(UserError, match="is not SentencePiece's"):
        space_prefix(spec)
