"""Whether two tokenizers, each given as its files, split text alike: by their vocabularies, then on hard lines."""

from typing import Any

HARD_LINES = [
    "  leading and   inner   spaces\tand\ttabs ",
    "1234567890 3.14159 0xFF 1e-5",
    "naïve café — “quotes” … ﬁ ½",
    "日本語のテキスト 한국어 العربية עברית",
    "emoji 🙂👩‍👩‍👧 and \u200b zero width",
    "don't we'll I'm you've they'd IT'S",
    "def f(x: int) -> str:  # comment",
    "\u00a0non-breaking\u2003em space",
]


def difference(have: dict[str, bytes], want: dict[str, bytes]) -> str | None:
    """The first way in which the tokenizers differ, in words; None if there is none or one has no tokenizer.json.

    have, want: file name -> contents. What they add before and after a text is not compared, nor how they are written.
    """
    if "tokenizer.json" not in have or "tokenizer.json" not in want:
        name = next((n for n in sorted(have.keys() & want.keys()) if have[n] != want[n]), None)
        return None if name is None else f"the tokenizer's {name} is another"
    if have["tokenizer.json"] == want["tokenizer.json"]:
        return None
    loaded: list[Any] = []
    for said, files in (("this", have), ("the other", want)):
        try:
            loaded.append(_load(files["tokenizer.json"]))
        except Exception as e:  # the library raises plain Exception
            return f"{said} tokenizer.json cannot be read: {str(e)[:100]}"
    # GGUF names the rows of the embedding that no token has
    ours, theirs = ({t: i for t, i in x.get_vocab().items() if t != f"[PAD{i}]"} for x in loaded)
    if ours != theirs:
        token = min(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
        return f"the tokenizer differs: {token!r} is token {ours.get(token)}, not {theirs.get(token)}"
    for line in HARD_LINES:
        a, b = (t.encode(line, add_special_tokens=False).ids for t in loaded)
        if a != b:
            return f"the tokenizer differs on {line!r}: {a[:12]}, not {b[:12]}"
    return None


def _load(content: bytes) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(content.decode())
