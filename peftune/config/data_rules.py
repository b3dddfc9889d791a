"""Settings of the data section that would change nothing, or that contradict themselves: refused, not ignored."""

from __future__ import annotations

from peftune.config.refusal import Refusal
from peftune.config.schema import RunConfig, Source

EXPECTED_COLUMNS: dict[str, tuple[str, ...]] = {
    "sequence_classification": ("text", "text_pair", "label"),
    "token_classification": ("tokens", "ner_tags"),
    "question_answering": ("question", "context", "answers", "is_impossible"),
    "causal_lm": ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text",
                  "system", "history", "tools"),
    "preference": ("prompt", "messages", "conversations", "chosen", "rejected", "system", "tools"),
}
"""Names that a task looks for in a row, by task; besides them `id`."""

NAMED = ("sequence_classification", "token_classification")
"""Tasks whose targets have names."""


def _unexpected(config: RunConfig) -> bool:
    return any(name not in (*EXPECTED_COLUMNS[config.task], "id") for name in config.data.columns)


def _weighs(sources: object) -> bool:
    return isinstance(sources, tuple) and any(isinstance(s, Source) and s.weight != 1.0 for s in sources)


DATA_RULES: tuple[Refusal[RunConfig], ...] = (
    Refusal(
        "data.columns", _unexpected,
        "a task reads nothing under the expected name, which stands before the name in the file",
        "rename as {expected: given}, with id or the task's own expected names: "
        + "; ".join(f"{task}: {', '.join(names)}" for task, names in EXPECTED_COLUMNS.items()),
    ),
    Refusal(
        "data.validation", lambda c: _weighs(c.data.validation),
        "each held-out row is scored once, whatever its weight", "leave weight out: it is for data.train",
    ),
    Refusal(
        "data.test", lambda c: _weighs(c.data.test),
        "each row of the test is scored once, whatever its weight", "leave weight out: it is for data.train",
    ),
    Refusal(
        "data.labels",
        lambda c: c.data.labels is not None and (c.task not in NAMED or c.data.problem_type == "regression"),
        "only classes and tags have names", "data.labels=null, or a task that has classes: " + ", ".join(NAMED),
    ),
    Refusal(
        "data.labels",
        lambda c: c.data.labels is not None and (
            not all(name.strip() for name in c.data.labels) or len(set(c.data.labels)) < max(1, len(c.data.labels))),
        "each class needs a name of its own, and one of them is empty or there twice",
        "name each class once, or data.labels=null for the labels of the training rows",
    ),
)
