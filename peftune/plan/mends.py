"""Changes that make a config fit which does not: what it may be, alone or together, and what each costs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftune.config.rules import RULES, strategy_faults
from peftune.config.schema import RunConfig
from peftune.config.sequence_rules import sequence_faults
from peftune.plan.answer import Answer, Case, Planner

SAME_RESULT = ("train.tokens_per_micro_batch", "model.gradient_checkpointing", "--strategy")
"""Changes after which a run learns the same."""
STRATEGY, LENGTH = "--strategy", "data.max_length"
LEAST_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Mend:
    """Changes that make it fit."""

    words: tuple[str, ...]
    """As on the command line."""
    answer: Answer

    @property
    def same_result(self) -> bool:
        """Whether the run would learn the same from the same."""
        return all(word.startswith(SAME_RESULT) for word in self.words)

    @property
    def offloads(self) -> bool:
        """Whether each step waits for the host's memory and processors, of which the rate says nothing."""
        return any(word.endswith("-offload") for word in self.words)


def mends(case: Case, planner: Planner) -> list[Mend]:
    """Changes that make it fit: each alone, and, where none of those keeps the result, as many as it takes together.

    Those that keep the result come first, of them the fastest; what is exchanged with the host is in no rate.
    """
    found: dict[str, Mend] = {}
    words = []
    for word, changed in changes(case):
        words.append(word)
        if word.startswith(LENGTH) and any(fitting.startswith(LENGTH) for fitting in found):
            continue  # no shorter than it must be
        if answer := _fitting(changed, planner):
            found[word] = Mend((word,), answer)
    ways = [*found.values()]
    if not any(way.same_result for way in ways):
        ways += _together(case, planner, [word for word in words if word.startswith(SAME_RESULT)])
    ways = ways or _together(case, planner, words)
    return sorted(ways, key=lambda way: (not way.same_result, way.offloads, -way.answer.tokens_per_second))


def _fitting(case: Case, planner: Planner) -> Answer | None:
    if not planner.may_fit(case):
        return None
    answer = planner.answer(case)
    return answer if answer.fits else None


def _together(case: Case, planner: Planner, words: Sequence[str]) -> list[Mend]:
    """The first changes that fit together, without those of them that it does not take; none where all do not."""
    taken: dict[str, str] = {}
    for word in words:
        taken[_kind(word)] = word  # of one kind the last one: it takes the least
        if (found := _with_all(case, [*taken.values()], planner)) is None:
            continue
        for kind in reversed([*taken]):
            fewer = [other for key, other in taken.items() if key != kind]
            if (without := _with_all(case, fewer, planner)) is not None:
                found = without
                del taken[kind]
        return [Mend((*taken.values(),), found)]
    return []


def _with_all(case: Case, words: Sequence[str], planner: Planner) -> Answer | None:
    """What is found after all of these changes; None where one is not possible after another, or it does not fit."""
    for word in words:
        after = dict(changes(case)).get(word)
        if after is None:
            return None
        case = after
    return _fitting(case, planner)


def _kind(word: str) -> str:
    return STRATEGY if word.startswith(STRATEGY) else word.partition("=")[0]


def changes(case: Case) -> Iterator[tuple[str, Case]]:
    """One change at a time, the ones that cost least first; none that the config's rules refuse."""
    for word, changed in _thinkable(case):
        config, division = changed.config, changed.division
        if not (any(rule.broken_by(config) for rule in RULES) or strategy_faults(config, division.strategy)
                or sequence_faults(config, division.sharing)):
            yield word, changed


def _thinkable(case: Case) -> Iterator[tuple[str, Case]]:
    config, model, train, data = case.config, case.config.model, case.config.train, case.config.data
    if train.tokens_per_micro_batch != "auto":
        yield _with(case, "train", "tokens_per_micro_batch", "auto")
    if model.gradient_checkpointing is False:
        yield _with(case, "model", "gradient_checkpointing", True)
    for strategy in ("zero1", "zero2", "fsdp2", "zero3", "zero3-offload") if case.division.ranks > 1 else ():
        if strategy != case.division.strategy:
            yield f"{STRATEGY} {strategy}", replace(case, division=replace(case.division, strategy=strategy))
    if model.dtype == "float32":
        yield _with(case, "model", "dtype", "bfloat16")
    bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    if config.adapter is not None and model.quantization == "none" and bitsandbytes:
        yield _with(case, "model", "quantization", "nf4")
    if config.adapter is None:
        if train.optimizer == "adamw" and bitsandbytes:
            yield _with(case, "train", "optimizer", "adamw_8bit")
        lora = RunConfig.model_validate({**config.model_dump(), "adapter": {"method": "lora"}})
        yield "adapter.method=lora", replace(case, config=lora)
    length = data.max_length // 2
    while data.too_long == "truncate" and length >= LEAST_LENGTH:
        yield _with(case, "data", "max_length", length)
        length //= 2


def _with(case: Case, section: str, key: str, value: Any) -> tuple[str, Case]:
    part = vars(case.config)[section].model_copy(update={key: value})
    return f"{section}.{key}={str(value).lower()}", replace(case, config=case.config.model_copy(update={section: part}))
