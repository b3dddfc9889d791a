"""Conversations -> text, and which characters of it the model learns to write."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from peftune.data.turns import is_learned
from peftune.errors import ConfigError, Fault

Message = Mapping[str, Any]
Span = tuple[int, int]
RENDER_LIMIT_S = 5.0
"""Of processor time for one conversation: thousands of times what real templates take."""
STAND_IN = "\ue000stand-in\ue000"  # of the private use area: no template and no conversation holds it

OPENED = re.compile(r"<think>\s*\Z")
"""What a generation prompt ends in that has the model think before it answers."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
STANDSTILL = (
    "{%- macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') | replace('%Y', '2024')"
    " | replace('%b', 'Jul') | replace('%B', 'July') }}{% endmacro %}{{ '' }}"
)
"""Before templates that write today's date (Llama 3.2, gpt-oss): the day that Llama's name where they know none. So
what is learned and scored depends on the data, not on the day."""
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
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Fault(kind="config", file=str(path), message=f"data.chat_template cannot be read: {error}",
                                mend="save it as UTF-8")) from None
    return wanted


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None, *,
    generation_prompt: bool = False,
) -> str:
    """The conversation as the model reads it.

    Arguments of calls are records, or a JSON text for a template that takes no records (DeepSeek's).

    A template is a program that comes with a model. transformers runs it in Jinja's sandbox, where it reaches no
    attribute that leads out of it; its time is bounded here.

    Raises:
        TemplateMismatch: the template refuses the conversation (a role order it does not know, say).
        ConfigError: it takes longer than RENDER_LIMIT_S.
    """
    known = list(tools) if tools else None
    try:
        template = tokenizer.get_chat_template(None, known)
        with _limited_time():
            whole: str = tokenizer.apply_chat_template(
                list(messages), tools=known, tokenize=False, add_generation_prompt=generation_prompt,
                chat_template=STANDSTILL + template if "strftime_now" in template else template)
        whole.encode("utf-8")  # half a surrogate pair is text for Python alone
        return whole
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 whatever a foreign program raises means that it does not render this
        written = _with_arguments_as_text(messages)
        if written != list(messages):
            return render(tokenizer, written, tools, generation_prompt=generation_prompt)
        raise TemplateMismatch(f"the chat template refuses it: {error}") from None


def _with_arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    def call_of(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), Mapping):
            return call
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
            if isinstance(message.get("tool_calls"), list) else message for message in messages]


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Bound the processor time of what runs inside. Signals reach the main thread alone; others have no bound."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, RENDER_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _too_slow(number: int, frame: object) -> NoReturn:
    raise ConfigError(Fault(kind="config", message="the chat template takes more than "
                            f"{RENDER_LIMIT_S:.0f} s of processor time for one conversation",
                            mend="data.chat_template=chatml, or another template that you trust"))


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant wrote, end-of-turn marks included.

    Needs no generation markers in the template. Turn i begins where the rendering of the turns before it,
    with the generation prompt, ends; and it ends where the rendering of the turns up to it ends.
    Templates that close a conversation otherwise than a turn (Phi-3 adds the end of text, gpt-oss takes another mark)
    show the end of an earlier turn where the next generation prompt begins. Templates that render the last turn
    otherwise than earlier ones (Qwen3 adds an empty thinking block, and strips thinking from turns that are not last)
    break the second rule; then a stand-in of known text takes the turn's place, and shows what follows an answer there
    and how much of that is its end mark.
    Generation prompts that open a thinking block (DeepSeek-R1's distilled models) stand before no turn that is rendered
    without one: such a turn begins where the block would. Of the last turn alone the thinking is learned there, put
    behind that prompt as the row has it, since these templates leave it out.

    Returns:
        The whole text, and [begin, end) character spans in it.

    Raises:
        TemplateMismatch: a turn cannot be found in the whole text, or what the model would read before it when
            generating is not what stands before it here.
    """
    turns = [i for i, message in enumerate(messages) if is_learned(message)]
    return _spans(tokenizer, messages, tools, turns)


def last_assistant_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None
) -> tuple[str, list[Span]]:
    """As `assistant_spans`, for the last assistant turn alone: earlier ones may be such as cannot be learned."""
    turns = [i for i, message in enumerate(messages) if is_learned(message)]
    return _spans(tokenizer, messages, tools, turns[-1:])


def _spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None, turns: Sequence[int]
) -> tuple[str, list[Span]]:
    show = partial(render, tokenizer, tools=tools)
    whole, eos = _with_last_thinking(show, messages), tokenizer.eos_token
    spans: list[Span] = []
    for i in turns:
        begin, end = _turn_begin(show, messages, whole, i), _turn_end(show, messages, whole, i, eos)
        if eos and whole.startswith(eos, end):  # a template that parts turns by their end mark: the last has none
            end += len(eos)
        if end <= begin:
            raise TemplateMismatch(f"the chat template does not show turn {i + 1}")
        spans.append((begin, end))
    return whole, spans


def _with_last_thinking(show: Callable[..., str], messages: Sequence[Message]) -> str:
    """The rendered conversation, with the thinking of the last turn where its generation prompt opens one."""
    whole, before, turn = show(messages), messages[:-1], messages[-1]
    thinking = turn.get("reasoning_content")
    said = f"{thinking}\n</think>\n\n{turn['content']}" if thinking else turn["content"]
    if not before or not is_learned(turn) or "</think>" not in said:
        return whole
    prompt = show(before, generation_prompt=True)
    begun = OPENED.sub("", prompt)
    if begun == prompt or whole.startswith(prompt):
        return whole
    stand_in = show([*before, {**turn, "content": STAND_IN}])
    if not stand_in.startswith(begun + STAND_IN):
        raise TemplateMismatch(f"turn {len(messages)} thinks, and the chat template leaves that out")
    return prompt + re.sub(r"\A\s*<think>\s*", "", said) + stand_in.removeprefix(begun + STAND_IN)


def _turn_begin(show: Callable[..., str], messages: Sequence[Message], whole: str, i: int) -> int:
    if i == 0:  # many templates refuse to render no turn at all
        header = show(messages, generation_prompt=True).removeprefix(whole)
        for known in (header, OPENED.sub("", header)):
            if known and known in whole:
                return whole.index(known) + len(known)
        raise TemplateMismatch("the chat template does not show where turn 1 begins")
    prompt = show(messages[:i], generation_prompt=True)
    for known in (prompt, OPENED.sub("", prompt)):
        if whole.startswith(known):
            return len(known)
    raise TemplateMismatch(
        f"the chat template renders the turns before turn {i + 1} otherwise once more turns follow: "
        "what the model would learn from is not what it reads when it answers"
    )


def _turn_end(show: Callable[..., str], messages: Sequence[Message], whole: str, i: int, eos: str | None) -> int:
    before, turn, after = messages[:i], messages[i], messages[i + 1:]
    stand_in = {key: value for key, value in turn.items() if key != "tool_calls"} | {"content": STAND_IN}
    if turn.get("tool_calls") and show([*before, stand_in]) == show([*before, {**turn, "content": STAND_IN}]):
        raise TemplateMismatch(f"turn {i + 1} calls tools, and the chat template leaves that out")
    upto = show([*before, turn])
    if whole.startswith(upto):
        return len(upto)
    header = _generation_header(show, before, eos)
    prompt = show([*before, turn], generation_prompt=True)
    if header and prompt.endswith(header) and whole.startswith(prompt.removesuffix(header)):
        return len(prompt) - len(header)
    mark = show([*before, stand_in]).rpartition(STAND_IN)[2]
    rest = show([*before, stand_in, *after]).rpartition(STAND_IN)[2]
    if rest.startswith(mark) and whole.endswith(rest):
        return len(whole) - len(rest) + len(mark)
    raise TemplateMismatch(f"turn {i + 1} cannot be found in what the chat template renders")


def _generation_header(show: Callable[..., str], messages: Sequence[Message], eos: str | None) -> str:
    """What a generation prompt adds to these turns, whose rendering may end in a mark that only closes the whole."""
    if not messages:
        return ""
    closed, prompt = show(messages), show(messages, generation_prompt=True)
    turns = closed if prompt.startswith(closed) else closed.removesuffix(eos or "")
    return prompt.removeprefix(turns) if prompt.startswith(turns) else ""


def round_trip_fault(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None, ids: Sequence[int]
) -> str | None:
    """Say which answer does not come back when the tokens are decoded; None where all do.

    White space does not count, nor how an accent is encoded: tokenizers change both and lose nothing by it.

    Args:
        tokenizer: with its chat template.
        messages: the conversation, in full.
        tools: the tools it may call.
        ids: its tokens up to the end of the last answer at least; not cut to a maximum length.

    Raises:
        TemplateMismatch: as `assistant_spans`.
    """
    whole, spans = assistant_spans(tokenizer, messages, tools)
    back, at = _letters(tokenizer.decode(list(ids))), 0
    for number, (begin, end) in enumerate(spans, start=1):
        said = whole[begin:end].partition(tokenizer.eos_token)[0]
        wanted = _letters(said)
        found = back.find(wanted, at)
        if found < 0:
            return f"answer {number} does not come back from its tokens: {said.strip()!r:.60}"
        at = found + len(wanted)
    return None


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())
