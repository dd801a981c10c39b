"""Conversations: what makes one valid, how the tokenizer's template renders it, and where the assistant speaks."""

import re
from collections.abc import Callable
from typing import Any

from qat.data.readers import kind_of
from qat.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
Spans = list[int]  # start, end, start, end, ...: characters of the rendered text that carry loss
Render = Callable[[list[dict[str, Any]]], tuple[str, Spans]]


class Refused(Exception):
    """This conversation cannot be used; the message says why."""


def check(messages: object) -> list[dict[str, Any]]:
    """The messages if they are a non-empty list of {role, content} with an assistant turn. Raises Refused."""
    if not isinstance(messages, list):
        raise Refused(f"'messages' must be a list, here is {kind_of(messages)}")
    if not messages:
        raise Refused("'messages' is empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise Refused(f"message {number} must be an object with role and content, here is {kind_of(message)}")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise Refused(f"message {number}: '{field}' must be text, here is {kind_of(message.get(field))}")
        if message["role"] not in ROLES:
            raise Refused(f"message {number}: role '{message['role']}' is none of {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise Refused("no message has the role assistant, so there is nothing to learn from")
    # A parquet struct has every key in every message; what is null was not said.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def renderer(tokenizer: Any) -> Render:
    """A function from checked messages to (rendered text, assistant spans) by this tokenizer's chat template.

    Raises UserError without a template, or with a tokenizer that cannot map tokens to characters.
    """
    template = getattr(tokenizer, "chat_template", None)
    name = getattr(tokenizer, "name_or_path", "") or "this model"
    if not template:
        raise UserError(
            f"the tokenizer of {name} has no chat template, so conversations cannot be rendered; use a chat model's "
            "tokenizer, put a chat_template.jinja into the model folder, or give plain text with data.text_column"
        )
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {name} cannot map tokens to characters, which the loss on replies needs")
    if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return lambda messages: _tagged(tokenizer, messages)
    return lambda messages: _by_prefix(tokenizer, messages)


def labels(ids: list[int], offsets: list[tuple[int, int]], spans: Spans) -> list[int]:
    """The ids where a token begins inside a span, -100 elsewhere."""
    out, at = [-100] * len(ids), 0
    for n, (start, end) in enumerate(offsets):
        while at < len(spans) and start >= spans[at + 1]:
            at += 2
        if at < len(spans) and start >= spans[at] and end > start:
            out[n] = ids[n]
    return out


def _tagged(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, Spans]:
    """The template itself marks the replies ({% generation %}); transformers' renderer returns their characters."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, marks = _refusing(
        lambda: render_jinja_template(
            [messages],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    )
    return rendered[0], [place for mark in marks[0] for place in mark]


def _by_prefix(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, Spans]:
    """A reply runs from the end of the conversation before it, its header included, to the end of its own turn."""
    whole, spans = _render(tokenizer, messages), []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:n], add_generation_prompt=True) if n else ""
        through = _render(tokenizer, messages[: n + 1])
        if not whole.startswith(through):
            # Some templates render the last turn otherwise (reasoning blocks): look for the reply and its ending.
            content = message["content"].strip()
            through = before + content + through.rpartition(content)[2]
        if not (whole.startswith(before) and whole.startswith(through) and len(through) > len(before)):
            raise Refused(
                f"the chat template renders what leads up to message {n + 1} otherwise than within the whole "
                "conversation, so the reply cannot be told apart; use a template with {% generation %} tags"
            )
        spans += [len(before), len(through)]
    return whole, spans


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return _refusing(lambda: tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _refusing(render: Callable[[], Any]) -> Any:
    from jinja2 import TemplateError

    try:
        return render()
    except (TemplateError, TypeError, KeyError, ValueError) as e:
        raise Refused(f"the chat template refuses it: {e}") from e
