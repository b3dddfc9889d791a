"""Conversations -> text, and which characters of it the model learns to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from peftune.errors import ConfigError, Fault

Span = tuple[int, int]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
NAMED = {"chatml": CHATML, "plain": PLAIN}
"""Templates for tokenizers that have none; `plain` needs no special tokens but the end of text."""


class TemplateMismatch(ValueError):
    """A template that renders a conversation so that its assistant turns cannot be found again."""


def choose_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> str:
    """Give the tokenizer the template that `data.chat_template` names, and say in a word which one it is.

    Raises:
        ConfigError: neither a known name, nor a file, nor Jinja text.
    """
    if wanted is None:
        if tokenizer.chat_template is not None:
            return "the tokenizer's own"
        tokenizer.chat_template = PLAIN
        return "plain (the tokenizer has none)"
    if wanted in NAMED:
        tokenizer.chat_template = NAMED[wanted]
        return wanted
    if "{%" in wanted or "{{" in wanted:
        tokenizer.chat_template = wanted
        return "from the config"
    path = Path(wanted)
    if not path.is_file():
        raise ConfigError(
            Fault(kind="config", message=f"data.chat_template = {wanted!r}: no such file, and not a known name",
                  mend=f"use {', '.join(NAMED)}, a Jinja file, or Jinja text")
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return wanted


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, *,
    generation_prompt: bool = False,
) -> str:
    """The conversation as the model reads it.

    Raises:
        TemplateMismatch: the template refuses the conversation (a role order it does not know, say).
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise TemplateMismatch(f"the chat template refuses it: {error}") from None


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant wrote, end-of-turn marks included.

    Needs no generation markers in the template. Turn i begins where the rendering of the turns before it,
    with the generation prompt, ends; and it ends where the rendering of the turns up to it ends.
    Templates that render the last turn otherwise than earlier ones (Qwen3 adds an empty thinking block)
    break the second rule; then the turn's own text is searched after its beginning.

    Returns:
        The whole text, and [begin, end) character spans in it.

    Raises:
        TemplateMismatch: a turn cannot be found in the whole text.
    """
    whole = render(tokenizer, messages, tools)
    spans: list[Span] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = _turn_begin(tokenizer, messages[:i], tools, whole) if i else max(0, whole.find(message["content"]))
        upto = render(tokenizer, messages[: i + 1], tools)
        if whole.startswith(upto) and len(upto) > begin:
            spans.append((begin, len(upto)))
        else:
            spans.append((begin, _turn_end(whole, begin, upto, message["content"].strip(), i)))
    return whole, spans


def _turn_begin(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, whole: str
) -> int:
    prompt = render(tokenizer, before, tools, generation_prompt=True)
    if whole.startswith(prompt):
        return len(prompt)
    raise TemplateMismatch(
        f"the chat template renders the turns before turn {len(before) + 1} otherwise once more turns follow"
    )


def _turn_end(whole: str, begin: int, upto: str, content: str, turn: int) -> int:
    at = whole.find(content, begin)
    after = upto.rfind(content)
    if content and at >= 0 and after >= 0:
        mark = upto[after + len(content):]
        end = at + len(content)
        if whole.startswith(mark, end):
            return end + len(mark)
    raise TemplateMismatch(f"turn {turn + 1} cannot be found in what the chat template renders")
