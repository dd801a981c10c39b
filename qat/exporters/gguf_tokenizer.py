"""A Hugging Face tokenizer.json -> GGUF's tokenizer metadata, so that llama.cpp splits text into the same tokens.

Two kinds exist in the families we export: byte-level BPE (GPT-2, GPT-NeoX, Llama 3, Qwen), which llama.cpp calls
"gpt2" and tells apart by the name of a pre-tokenizer regex; and SentencePiece-style BPE with byte fallback (Llama 2,
Mistral, Phi 3, Gemma), which it calls "llama" and drives by scores. What llama.cpp would split differently is refused,
but for rarities that every GGUF file has (`known_difference`).
"""

import json
import os
import re
import unicodedata
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from qat.errors import UserError

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
# what the pre-tokenizer does, and whether the model skips merges for known words -> llama.cpp's name for it
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes+regex",), False): "gpt-2",
    (("digits", "bytes+regex"), False): "smollm",
    ((_HEAD + r"\p{N}{1,3}" + _TAIL, "bytes"), True): "llama-bpe",
    ((_HEAD + r"\p{N}{1,3}" + _TAIL, "bytes"), False): "smaug-bpe",
    ((_HEAD + r"\p{N}" + _TAIL, "bytes"), False): "qwen2",
}

_SAME = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # llama.cpp's other names


def _steps(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer or normalizer, sequences flattened."""
    if node is None:
        return []
    return [s for part in node[key] for s in _steps(part, key)] if node["type"] == "Sequence" else [node]


def _step_name(step: dict[str, Any]) -> str:
    """A pre-tokenizer step as `_PRE_TOKENIZERS` spells it; anything unusual keeps its JSON and so matches nothing."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "bytes+regex" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return regex
    return json.dumps(step)


def pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's `tokenizer.ggml.pre` for a byte-level tokenizer.json. Raises UserError if it has no name for it."""
    steps = tuple(_step_name(s) for s in _steps(spec["pre_tokenizer"], "pretokenizers"))
    name = _PRE_TOKENIZERS.get((steps, bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise UserError(
            f"llama.cpp would not tokenize as this tokenizer does: its pre-tokenizer {' then '.join(steps) or 'none'} "
            "is unknown to the GGUF export; use the hf target"
        )
    odd = [s["type"] for s in _steps(spec["normalizer"], "normalizers") if s["type"] != "NFC"]
    if odd:
        raise UserError(f"llama.cpp's byte-level tokenizer knows no {odd[0]} normalizer; use the hf target")
    return name


def pre_tokenizer_steps(name: str) -> tuple[list[dict[str, Any]], bool]:
    """The steps, as tokenizer.json writes them, of a pre-tokenizer of llama.cpp's, and whether merges are skipped for
    known words. Raises UserError for one whose rule is not known here."""
    found = [key for key, known in _PRE_TOKENIZERS.items() if known == _SAME.get(name, name)]
    if not found:
        known = ", ".join(sorted({*_PRE_TOKENIZERS.values(), *_SAME}))
        raise UserError(f"the GGUF file's pre-tokenizer {name!r} is unknown here; known are {known}")
    (steps, ignore_merges), *_ = found
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {
        "bytes": {**byte_level, "use_regex": False},
        "bytes+regex": {**byte_level, "use_regex": True},
        "digits": {"type": "Digits", "individual_digits": True},
    }
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    return [special.get(s) or {**split, "pattern": {"Regex": s}} for s in steps], ignore_merges


def space_prefix(spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece-style tokenizer puts a space before the text. Raises UserError if it does more."""
    normalizers = _steps(spec["normalizer"], "normalizers")
    match normalizers, _steps(spec["pre_tokenizer"], "pretokenizers"):
        case [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace"}], []:
            return True
        case [{"type": "Replace", "content": "▁"}], [] | [{"type": "Split", "pattern": {"String": " "}}]:
            return False  # Gemma splits at the spaces that are no longer there
        case [], [{"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}]:
            return scheme != "never"
    raise UserError(
        "llama.cpp would not tokenize as this tokenizer does: its normalizer or pre-tokenizer is not SentencePiece's; "
        "use the hf target"
    )


def scores(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, float]:
    """Token -> score: SentencePiece joins the pair whose result scores highest, so earlier merges score higher.

    Raises UserError where scores cannot say what the merges say: a pair that could merge but must not, or the merges
    of one token interrupted by another's.
    """
    groups: list[str] = []
    for left, right in merges:
        if not groups or groups[-1] != left + right:
            groups.append(left + right)
    allowed = set(merges)
    possible = {(t[:i], t[i:]) for t in set(groups) for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab}
    if len(set(groups)) != len(groups) or not possible <= allowed:
        raise UserError("this tokenizer's merges cannot be written as SentencePiece scores; use the hf target")
    return {token: -float(rank) for rank, token in enumerate(groups)}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(left, right) for left, right in pairs]


def user_defined(spec: dict[str, Any]) -> set[str]:
    """Added tokens that are not special: llama.cpp finds them in the text before it merges anything."""
    return {t["content"] for t in spec["added_tokens"] if not t["special"]}


def without_user_defined(merges: list[tuple[str, str]], own: set[str]) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores must say. Gemma's runs of spaces are user-defined, and merged first.

    Raises UserError where finding them before any merge gives other tokens than merging them.
    """
    made = [left + right in own for left, right in merges]
    rest = merges[sum(made) :]
    if not all(made[: sum(made)]) or any("▁" in part and part in own for pair in rest for part in pair):
        raise UserError("llama.cpp would split this tokenizer's user-defined tokens otherwise; use the hf target")
    return rest


def _token_types(spec: dict[str, Any], n_vocab: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types of all `n_vocab` ids; ids that the tokenizer does not use (padded embeddings) are UNUSED."""
    model = spec["model"]
    texts = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [TokenType.UNUSED] * n_vocab
    added = {t["id"]: t for t in spec["added_tokens"]}
    used = {**{i: t for t, i in model["vocab"].items()}, **{i: t["content"] for i, t in added.items()}}
    if max(used) >= n_vocab:
        raise UserError(f"the tokenizer has {max(used) + 1} tokens, the model's embedding only {n_vocab}; resize it")
    for i, text in used.items():
        texts[i], types[i] = text, TokenType.NORMAL
        if i in added:
            types[i] = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[i] = TokenType.BYTE
    if model.get("unk_token") in model["vocab"] and model.get("byte_fallback"):
        types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    return texts, types


def write_tokenizer(w: GGUFWriter, files: dict[str, bytes], config: dict[str, Any], n_vocab: int) -> None:
    """Add everything under `tokenizer.` for a model with `n_vocab` embedding rows. Raises UserError."""
    if "tokenizer.json" not in files:
        raise UserError("GGUF holds the tokenizer too, and this model has no tokenizer.json; give it a fast tokenizer")
    spec = json.loads(files["tokenizer.json"])
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    model = spec["model"]
    if model["type"] != "BPE" or model.get("dropout"):
        raise UserError(f"GGUF export knows BPE tokenizers without dropout, not {model['type']}; use the hf target")
    texts, types = _token_types(spec, n_vocab)
    merges = _merges(model)
    if model.get("byte_fallback"):
        prefix = space_prefix(spec)
        own = user_defined(spec)
        known = scores(model["vocab"], without_user_defined(merges, own))
        texts = [t.replace("▁", " ") if t in own else t for t in texts]  # they are looked for in the text as it is
        lowest = -float(len(known))
        w.add_tokenizer_model("llama")
        w.add_tokenizer_pre("default")
        w.add_token_list(texts)
        pairs = zip(texts, types, strict=True)
        w.add_token_scores([known.get(t, lowest) if kind == TokenType.NORMAL else 0.0 for t, kind in pairs])
        w.add_add_space_prefix(prefix)
    else:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre(pre_tokenizer(spec))
        w.add_token_list(texts)
        w.add_token_merges([f"{left} {right}" for left, right in merges])
    w.add_token_types(types)
    _write_special(w, Tokenizer.from_str(files["tokenizer.json"].decode()), settings, config, n_vocab)
    template = files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if template:
        w.add_chat_template(template)


def refuse_tokenizer(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    """Why GGUF cannot hold this tokenizer, known before any training; None if it can."""
    try:
        write_tokenizer(GGUFWriter(os.devnull, "none"), files, config, config["vocab_size"])  # never written
    except UserError as error:
        return str(error)
    return None


PHI3 = re.compile("phi-?3", re.IGNORECASE)
_PHI3_KEEPS = {"<unk>", "<s>", "<|endoftext|>"}  # llama.cpp wants them in the vocabulary of a model of that name


def swallows_spaces(files: dict[str, bytes]) -> bool:
    """Whether added tokens take the spaces after them as llama.cpp does for a model with phi-3 in its name."""
    added = json.loads(files["tokenizer.json"])["added_tokens"] if "tokenizer.json" in files else []
    takes = {t["content"] for t in added if t["rstrip"]}
    keeps = {t["content"] for t in added if not t["rstrip"]}
    return keeps == _PHI3_KEEPS and "</s>" in takes and not any(t["lstrip"] for t in added)


def known_difference(files: dict[str, bytes], line: str) -> str | None:
    """Why llama.cpp splits this line differently in any GGUF file of such a tokenizer; None if it must be equal."""
    spec = json.loads(files["tokenizer.json"])
    for token in spec["added_tokens"]:
        if (token["lstrip"] or token["rstrip"]) and token["content"] in line and not swallows_spaces(files):
            return "llama.cpp keeps the spaces around added tokens; this tokenizer gives some of them to the token"
    composes = any(s["type"] == "NFC" for s in _steps(spec["normalizer"], "normalizers"))
    if composes and not unicodedata.is_normalized("NFC", line):
        return "llama.cpp does not compose characters (NFC)"
    runs = [len(t) for t in user_defined(spec) if t == "▁" * len(t)] if spec["model"].get("byte_fallback") else []
    if runs and ("▁" in line or " " * (max(runs) + 1) in line):
        return f"llama.cpp takes runs of more than {max(runs)} spaces, and the character ▁, in other pieces"
    for step in _steps(spec["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never" and line.startswith((" ", "▁")):
            return "llama.cpp, as SentencePiece, puts a space before a line that begins with one; tokenizers does not"
    return None


def _write_special(
    w: GGUFWriter, tokenizer: Tokenizer, settings: dict[str, Any], config: dict[str, Any], n_vocab: int
) -> None:
    """Ids of the special tokens, and whether encoding adds them: seen by encoding one letter."""
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        text = token["content"] if isinstance(token, dict) else token
        listed = config.get(f"{kind}_token_id")
        first = listed[0] if isinstance(listed, list) else listed
        found = tokenizer.token_to_id(text) if text else first
        if found is not None and found < n_vocab:
            ids[kind] = found
            getattr(w, f"add_{kind}_token_id")(found)
    encoded = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    before = encoded[: max(0, len(encoded) - len(bare))] if encoded[-len(bare) :] == bare else encoded[:1]
    w.add_add_bos_token(ids.get("bos") in before)
    w.add_add_eos_token(len(encoded) > len(bare) and encoded[-1] == ids.get("eos"))
