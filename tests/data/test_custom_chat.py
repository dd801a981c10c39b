"""Conversations: the loss falls on what the assistant says and on nothing else, whatever the template."""

import json
import sys
from pathlib import Path

import pytest

from qat.data.chat import Refused, check, labels, renderer
from qat.data.custom import CustomData
from qat.errors import UserError

sys.path.append(str(Path(__file__).parents[1]))
from tiny_models import tiny_tokenizer

# As shipped by chat models: ChatML, ChatML with generation tags, Llama 2, and Qwen 3's way with the last turn.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = "{{ messages | length }}:{% for m in messages %}{{ m['content'] }};{% endfor %}"

TALK = [
    {"role": "user", "content": "the fox? 🦊"},
    {"role": "assistant", "content": "\n the quick brown fox"},
    {"role": "user", "content": "assistant: jumps"},
    {"role": "assistant", "content": "over the lazy dog"},
]
END = "<|endoftext|>"
SPOKEN = {
    CHATML: ["\n the quick brown fox<|im_end|>\n", "over the lazy dog<|im_end|>\n"],
    TAGGED: ["\n the quick brown fox<|im_end|>\n", "over the lazy dog<|im_end|>\n"],
    LLAMA2: [f" \n the quick brown fox {END}", f" over the lazy dog {END}"],
}


def tokenizer(template: str | None):
    return tiny_tokenizer(chat_template=template)


def encoded(template: str, messages: list[dict[str, str]]):
    """(ids, labels) of one conversation."""
    tok = tokenizer(template)
    text, spans = renderer(tok)(messages)
    made = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    return tok, made["input_ids"], labels(made["input_ids"], made["offset_mapping"], spans)


@pytest.mark.parametrize("template", list(SPOKEN), ids=["chatml", "tagged", "llama2"])
def test_the_loss_is_on_the_assistants_turns(template):
    tok, ids, marked = encoded(template, TALK)
    assert ids == tok.apply_chat_template(TALK, tokenize=True)["input_ids"]
    runs, run = [], []
    for token, label in zip(ids, marked, strict=True):
        assert label in (-100, token)
        if label == -100 and run:
            runs, run = [*runs, tok.decode(run)], []
        run += [token] if label != -100 else []
    assert [*runs, *([tok.decode(run)] if run else [])] == SPOKEN[template]


def test_generation_tags_give_the_mask_that_transformers_gives():
    tok, ids, marked = encoded(TAGGED, TALK)
    reference = tok.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == reference["input_ids"]
    assert [int(label != -100) for label in marked] == reference["assistant_masks"]


def test_tags_and_prefixes_agree_where_a_template_has_both_forms():
    assert encoded(TAGGED, TALK)[1:] == encoded(CHATML, TALK)[1:]


def test_a_template_that_treats_the_last_turn_otherwise():
    talk = [*TALK[:1], {"role": "assistant", "content": "the quick brown fox"}, *TALK[2:]]
    text, spans = renderer(tokenizer(THINKS))(talk)
    said = [text[a:b] for a, b in zip(spans[::2], spans[1::2], strict=True)]
    assert said == ["the quick brown fox<|im_end|>\n", "<think>\n\n</think>\n\nover the lazy dog<|im_end|>\n"]


def test_a_template_that_rewrites_what_came_before_is_refused():
    with pytest.raises(Refused, match=r"message 2 otherwise .* use a template with \{% generation %\} tags"):
        renderer(tokenizer(REWRITES))(TALK)


def test_a_role_that_the_template_refuses():
    with pytest.raises(Refused, match="template refuses it: Only user and assistant roles"):
        renderer(tokenizer(LLAMA2))([{"role": "system", "content": "x"}, *TALK])


def test_no_template_names_the_remedy():
    with pytest.raises(UserError, match=r"has no chat template.*chat_template\.jinja.*data\.text_column"):
        renderer(tokenizer(None))


BAD = [
    ("hello", "'messages' must be a list, here is text"),
    (None, "'messages' must be a list, here is null"),
    ([], "'messages' is empty"),
    (["hi"], "message 1 must be an object with role and content, here is text"),
    ([{"role": "user"}], "message 1: 'content' must be text, here is null"),
    ([{"role": "user", "content": ["x"]}], "message 1: 'content' must be text, here is a list"),
    ([{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}], "message 2: role 'bot' is none of system"),
    ([{"role": "user", "content": "x"}], "no message has the role assistant"),
]


@pytest.mark.parametrize(("messages", "problem"), BAD)
def test_malformed_conversations(messages, problem, tmp_path):
    with pytest.raises(Refused, match="^" + problem):
        check(messages)
    good = json.dumps({"messages": TALK}) + "\n"
    file = tmp_path / "chat.jsonl"
    file.write_text(good + json.dumps({"messages": messages}) + "\n" + good * 40)
    with pytest.raises(UserError, match=f"line 2: {problem}"):
        data(file, tmp_path).rows("train")
    skipping = data(file, tmp_path, on_bad_row="skip")
    skipping.rows("train")
    assert skipping.describe()["read"]["train"]["bad_rows"] == 1


def data(file: Path, tmp_path: Path, template: str = CHATML, **options) -> CustomData:
    cache = str(tmp_path / "cache")
    made = CustomData(path=str(file), block_size=16, batch_size=2, cache_dir=cache, **options)
    made.attach(tokenizer(template))
    return made


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_packed_conversations_keep_their_labels(kind, tmp_path):
    rows = [
        [{"role": "user", "content": f"jumps {n}"}, {"role": "assistant", "content": f"dog {n}"}] for n in range(99)
    ]
    file = tmp_path / f"chat.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"messages": rows}), file)
    elif kind == "csv":
        import csv

        with file.open("w", newline="") as handle:
            csv.writer(handle).writerows([["messages"], *([json.dumps(row)] for row in rows)])
    else:
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    made = data(file, tmp_path)
    tok = made.tokenizer
    windows = made.windows("train")
    ids, marks = windows["input_ids"][:].flatten(), windows["labels"][:].flatten()
    assert bool(((marks == -100) | (marks == ids)).all())
    text, said = tok.decode(ids), tok.decode(marks[marks != -100])
    numbers = [line.split()[1].removesuffix("<|im_end|>") for line in text.split("\n") if line.startswith("dog ")]
    assert len(numbers) > 80
    complete = said.count("<|im_end|>\n")
    assert said.startswith("".join(f"dog {n}<|im_end|>\n" for n in numbers[:complete]))


def test_a_conversation_without_a_template_is_refused_in_a_run(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(UserError, match="no chat template"):
        data(file, tmp_path, template=None).rows("train")
