"""Settings that would change nothing, or data settings that contradict themselves: refused, not ignored."""

from __future__ import annotations

from peftune.config.refusal import Refusal
from peftune.config.schema import GENERATIVE, RunConfig, Source

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
    Refusal(
        "data.problem_type",
        lambda c: c.data.problem_type != "auto" and c.task != "sequence_classification",
        "only labels of whole texts are of several kinds", "data.problem_type=auto, or task=sequence_classification",
    ),
    Refusal(
        "data.subtokens", lambda c: c.data.subtokens != "first" and c.task != "token_classification",
        "only tags of words are learned by sub-tokens", "data.subtokens=first, or task=token_classification",
    ),
    Refusal(
        "data.doc_stride", lambda c: c.data.doc_stride is not None and c.task != "question_answering",
        "only the contexts of questions are read in windows", "data.doc_stride=null, or task=question_answering",
    ),
    Refusal(
        "data.chat_template", lambda c: c.data.chat_template is not None and c.task not in GENERATIVE,
        "only conversations are rendered by a chat template", "data.chat_template=null, or task=causal_lm",
    ),
    Refusal(
        "train.dpo_beta", lambda c: c.train.dpo_beta != 0.1 and c.task != "preference",
        "only preferences are learned beside a reference model", "train.dpo_beta=0.1, or task=preference",
    ),
    Refusal(
        "evaluation.n_best", lambda c: c.evaluation.n_best != 20 and c.task != "question_answering",
        "only questions have ranked answers", "evaluation.n_best=20, or task=question_answering",
    ),
    Refusal(
        "evaluation.max_answer_tokens",
        lambda c: c.evaluation.max_answer_tokens != 30 and c.task != "question_answering",
        "only answers to questions are looked for in a text; evaluation.max_new_tokens bounds generated ones",
        "evaluation.max_answer_tokens=30, or task=question_answering",
    ),
    Refusal(
        "evaluation.no_answer_threshold",
        lambda c: c.evaluation.no_answer_threshold != 0 and c.task != "question_answering",
        "only questions may go without an answer", "evaluation.no_answer_threshold=0, or task=question_answering",
    ),
)
