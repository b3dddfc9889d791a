"""What stands beside prompts and answers: a context to read, or a mark that says if the answer is wanted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peftune.data.formats import ANSWERED, MARKS, OTHER_NAMES
from peftune.errors import DataError, Fault

Values = Mapping[str, Any]

CONTEXTS = ("context", *OTHER_NAMES["context"])
QUESTIONS = ("question", *OTHER_NAMES["question"])
AS_LISTS = 'where a row has several classes, write them as one list in JSON Lines: {"label": ["toxic"]}'


def are_flags(values: Iterable[Any]) -> bool:
    """Whether there are values, and all of them are true or false, or 1 or 0, also as text."""
    words = [str(value).lower() for value in values]
    return bool(words) and all(word in ("0", "1", "true", "false") for word in words)


def as_instructions(names: Sequence[str], renames: Mapping[str, str], given: Collection[str]) -> dict[str, str]:
    """The renames that make a question, its context and an answer an instruction with its input and output.

    Args:
        names: of all columns.
        renames: those of prompts and completions.
        given: what the user has renamed.

    Returns:
        Empty where the prompt is no question, no context is there, or the user has said which column is the prompt.
    """
    prompt, completion = renames.get("prompt", "prompt"), renames.get("completion", "completion")
    context = next((name for one in CONTEXTS for name in names if name.lower() == one), None)
    if context is None or context == completion or prompt.lower() not in QUESTIONS or "prompt" in given:
        return {}
    system = {key: value for key, value in renames.items() if key == "system"}
    return {"instruction": prompt, "input": context, "output": completion, **system}


def notes_beside(
    file: str, rows: Sequence[Values], format: str, renames: Mapping[str, str], unread: Sequence[str], task: str | None
) -> Iterator[str]:
    """What the columns may mean besides what is learned of them.

    Args:
        file: for messages.
        rows: raw.
        format: of the rows.
        renames: of their columns.
        unread: columns that the format does not read.
        task: given by the user, or None.

    Raises:
        DataError: unwanted answers would be learned, and no task was asked for.
    """
    label = renames.get("label", "label")
    if format == "classification" and label.lower() != "label":
        flags = [name for name in (label, *unread) if are_flags(_filled(rows, name))]
        if label in flags and len(flags) > 1:
            yield f"{', '.join(flags)} hold 0 and 1: {AS_LISTS}"
    marks = [name for name in unread if name.lower() in MARKS] if format in ANSWERED else []
    if mark := next((name for name in marks if are_flags(_filled(rows, name))), None):
        if task is None:
            raise DataError(Fault(
                kind="data", file=file, mend="pair them as chosen and rejected, for task: preference; or keep the "
                "answers that are wanted, and say --task causal_lm, which learns all that are there",
                message=f"{mark} says which answers are wanted (KTO): that is not learned here"))
        yield f"{mark} may say which answers are wanted: all are learned alike"
    if task is None and {"input", "output"} <= renames.keys() and _cites_contexts(rows, renames):
        yield ("most answers stand in their contexts: --task question_answering finds them there, given answers as "
               '[{"text": "...", "answer_start": 17}]')


def _filled(rows: Sequence[Values], name: str) -> list[Any]:
    return [row[name] for row in rows if row.get(name) not in (None, "")]


def _cites_contexts(rows: Sequence[Values], renames: Mapping[str, str]) -> bool:
    pairs = [(str(row.get(renames["output"]) or ""), str(row.get(renames["input"]) or "")) for row in rows]
    return 2 * sum(bool(answer.strip()) and answer in context for answer, context in pairs) > len(rows)
