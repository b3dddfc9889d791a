"""Settings that some tasks alone heed: elsewhere they would change nothing, and are refused, not ignored."""

from __future__ import annotations

from pydantic import BaseModel

from peftune.config.refusal import Refusal
from peftune.config.schema import GENERATIVE, DataConfig, EvaluationConfig, RunConfig, TrainConfig

SECTIONS: dict[str, type[BaseModel]] = {"data": DataConfig, "train": TrainConfig, "evaluation": EvaluationConfig}


def _heeded(key: str, tasks: tuple[str, ...], why: str) -> Refusal[RunConfig]:
    """Other tasks than these take nothing but the schema's default."""
    section, _, name = key.partition(".")
    default = SECTIONS[section].model_fields[name].default
    shown = "null" if default is None else f"{default:g}" if isinstance(default, float) else default

    def broken(config: RunConfig) -> bool:
        return config.task not in tasks and vars(vars(config)[section])[name] != default

    return Refusal(key, broken, why, f"{key}={shown}, or task={tasks[0]}")


QUESTIONS = ("question_answering",)
TASK_RULES: tuple[Refusal[RunConfig], ...] = (
    _heeded("data.problem_type", ("sequence_classification",), "only labels of whole texts are of several kinds"),
    _heeded("data.subtokens", ("token_classification",), "only tags of words are learned by sub-tokens"),
    _heeded("data.doc_stride", QUESTIONS, "only the contexts of questions are read in windows"),
    _heeded("data.chat_template", GENERATIVE, "only conversations are rendered by a chat template"),
    _heeded("train.dpo_beta", ("preference",), "only preferences are learned beside a reference model"),
    _heeded("evaluation.n_best", QUESTIONS, "only questions have ranked answers"),
    _heeded("evaluation.max_answer_tokens", QUESTIONS, "only answers to questions are looked for in a text; "
            "evaluation.max_new_tokens bounds generated ones"),
    _heeded("evaluation.no_answer_threshold", QUESTIONS, "only questions may go without an answer"),
)
