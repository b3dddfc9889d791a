"""Text to generate: ids, and which of them the model learns to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftune.data.canonical import PROMPT_COLUMNS, prompt_fields
from peftune.data.chat import Span, TemplateMismatch, assistant_spans, last_assistant_span, render, round_trip_fault
from peftune.data.examples import Example
from peftune.data.findings import Doubt
from peftune.data.formats import prompt_format
from peftune.data.targets import RowFault
from peftune.tasks.task import TextEncoder


def supervised_tokens(
    fields: Mapping[str, Any], text: TextEncoder, *, last_only: bool = False
) -> tuple[list[int], list[bool]]:
    """Ids of a text, a prompt with its completion or a conversation, and for each whether it is to be learned.

    Learned are all tokens of plain text, the completion, or the assistant turns (the last one only, if asked) with
    their end marks. The end-of-text token always closes the last of them and is learned itself, also where it
    doubles as padding; what a template writes behind it is cut. Text may hold end-of-text tokens of its own, between
    documents or turns.

    Raises:
        RowFault: the chat template refuses the conversation, or renders it so that turns cannot be found.
    """
    try:
        whole, spans, from_template = _supervised_text(fields, text, last_only)
    except TemplateMismatch as error:
        raise RowFault(str(error), "mend the row, or set data.chat_template") from None
    return _tokenise(whole, spans, from_template, text)


def _supervised_text(
    fields: Mapping[str, Any], text: TextEncoder, last_only: bool
) -> tuple[str, list[Span], bool]:
    """Text, character spans of it to learn, and whether a chat template has written it."""
    if "messages" in fields:
        find = last_assistant_span if last_only else assistant_spans
        whole, spans = find(text.tokenizer, fields["messages"], fields.get("tools"))
        return whole, spans, True
    if "prompt" in fields:
        prompt, completion = fields["prompt"], _to_its_end(fields["completion"], text)
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], False
    whole = _to_its_end(fields["text"], text)
    return whole, [(0, len(whole))], False


def _to_its_end(written: str, text: TextEncoder) -> str:
    """A text without the white space behind the end-of-text token that it ends in, if it ends in one."""
    ended, eos = written.rstrip(), text.tokenizer.eos_token
    return ended if eos and ended.endswith(eos) else written


def _tokenise(
    whole: str, spans: Sequence[Span], from_template: bool, text: TextEncoder
) -> tuple[list[int], list[bool]]:
    """Ids of the whole text and which of them are targets.

    The text is tokenised once, as it will be read, and each token that reaches into a span is a target.
    Within a span that a template has written nothing after its first end-of-text token is one: what follows is the
    template's, not the model's to write.
    """
    eos = text.tokenizer.eos_token_id
    encoding = text.tokenizer(whole, add_special_tokens=not from_template and not _begun(whole, text),
                              return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    supervised = [False] * len(ids)
    offsets = encoding["offset_mapping"]
    at = 0
    for begin, end in spans:
        ended = False
        # white space may have an empty offset, at its end: it belongs to the span that it closes
        while at < len(ids) and min(offsets[at][0], offsets[at][1] - 1) < end:
            if offsets[at][1] > begin and not ended:
                supervised[at] = True
                ended = from_template and ids[at] == eos
            at += 1
    end = max((i for i, on in enumerate(supervised) if on), default=-1) + 1
    if end == 0:
        return ids, supervised
    ids, supervised = ids[:end], supervised[:end]  # nothing is learned from what follows the last target
    if ids[-1] != eos:
        ids, supervised = [*ids, eos], [*supervised, True]
    return ids, supervised


def _begun(whole: str, text: TextEncoder) -> bool:
    """Whether a text begins with the token that tokenizers put before it, as one that was rendered elsewhere does."""
    bos = text.tokenizer.bos_token
    return bool(bos) and whole.startswith(bos)


def doubt(fields: Mapping[str, Any], text: TextEncoder) -> Doubt | None:
    """Why a conversation does not survive template and tokenizer, or a prompt its completion; None where it does."""
    why = _round_trip_doubt(fields, text) if "messages" in fields else None
    if why is not None:
        return Doubt("round_trip", why)
    return _joined_tokens(fields, text) if fields.get("prompt") else None


def _round_trip_doubt(fields: Mapping[str, Any], text: TextEncoder) -> str | None:
    try:
        whole, _ = assistant_spans(text.tokenizer, fields["messages"], fields.get("tools"))
        ids = text.tokenizer(whole, add_special_tokens=False)["input_ids"]
        return round_trip_fault(text.tokenizer, fields["messages"], fields.get("tools"), ids)
    except TemplateMismatch:
        return None  # said as a bad row


def _joined_tokens(fields: Mapping[str, Any], text: TextEncoder) -> Doubt | None:
    ids, supervised = supervised_tokens(fields, text)
    first = supervised.index(True) if any(supervised) else len(ids)
    if ids[:first] == _prompt_ids(fields["prompt"], text):
        return None
    joined = text.tokenizer.decode(ids[first : first + 1])
    return Doubt("joined_tokens", f"the prompt ends, and the completion begins, inside the token {joined!r:.40}")


def _prompt_ids(prompt: str, text: TextEncoder) -> list[int]:
    """Of a prompt alone, without the end-of-text token that some tokenizers put behind each text."""
    ids = list(text.tokenizer(prompt, add_special_tokens=not _begun(prompt, text))["input_ids"])
    own = prompt.endswith(text.tokenizer.eos_token)
    return ids[:-1] if ids and ids[-1] == text.tokenizer.eos_token_id and not own else ids


def prompt_tokens(fields: Mapping[str, Any], text: TextEncoder) -> Example:
    """A prompt, a conversation or an instruction -> the ids that generation continues; its end is kept when cut.

    Raises:
        RowFault: none of them is there, it is broken, or the template refuses it.
    """
    format = prompt_format(fields, text.data.format)
    if format is None:
        raise RowFault(f"none of {', '.join(PROMPT_COLUMNS.values())} is there", 'write {"prompt": "..."}, or name its '
                       "column with --config and data.columns={prompt: NAME}")
    asked = prompt_fields(fields, format)
    if "prompt" in asked:
        ids = _prompt_ids(asked["prompt"], text)
    else:
        try:
            whole = render(text.tokenizer, asked["messages"], asked.get("tools"), generation_prompt=True)
        except TemplateMismatch as error:
            raise RowFault(str(error), "mend the row") from None
        ids = text.tokenizer(whole, add_special_tokens=False)["input_ids"]
    return Example(ids[-text.max_length:], [], 0, len(ids), {"prompt_length": min(len(ids), text.max_length)})
