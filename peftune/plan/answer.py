"""`peftune plan`: does this config fit on these devices, and how long does it take."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peftune.config.schema import DataConfig, RunConfig
from peftune.data.prepare import open_prepared, prepare
from peftune.data.spool import SPLITS, needed_sources
from peftune.data.targets import Targets
from peftune.errors import DataError, Fault, ModelError, PeftuneError
from peftune.model.adapters import virtual_tokens
from peftune.model.load import adjust_config, longest_input
from peftune.model.resolve import load_model_config, resolve
from peftune.model.vocabulary import NO_ROWS, NewRows
from peftune.numerics.counted import counted
from peftune.plan.choose import SHARE, UNTRACEABLE, MemoryChoice, choose_memory, footprint_at, subject_of
from peftune.plan.devices import Device
from peftune.plan.divide import Division
from peftune.plan.footprint import Footprint, Tracer
from peftune.plan.models import Subject
from peftune.plan.work import Lengths, lengths_of, lengths_without_data
from peftune.tasks import TASKS
from peftune.tasks.text import open_text

WITHOUT_DATA: Mapping[str, Targets] = {
    "sequence_classification": Targets("single_label", ("a", "b"), "class"),
    "token_classification": Targets("bio", ("O", "B-a", "I-a")),
    "question_answering": Targets("answer"),
    "causal_lm": Targets("next_token"),
    "preference": Targets("preference", kind="pair"),
}
"""What is predicted, where no data says it: the fewest classes."""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run the config."""

    config: RunConfig
    device: Device
    division: Division


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found of a case."""

    case: Case
    choice: MemoryChoice
    found: Footprint
    fits: bool
    tokens_per_second: float
    """Of all devices together, by the device's stated rate."""
    seconds: float | None
    """Of the run's steps; None where the data is not known."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the model's folder and the data tell."""

    targets: Targets
    lengths: Lengths
    rows: NewRows
    pad_id: int
    note: str
    """Where the lengths come from."""


def known_of(config: RunConfig) -> Known:
    """Lengths from local data, where it and a tokenizer can be read; else `data.max_length`.

    Raises:
        ModelError: the model's config cannot be had.
        ConfigError: an adapter that cannot work.
    """
    task = TASKS[config.task](config.train, config.evaluation)
    try:
        if not _lies_here(config.data):
            raise DataError(Fault(kind="data", message="the data does not lie here"))
        text = open_text(task, config.model, config.data, config.adapter)
        data = open_prepared(prepare(config.data, text.encoder, seed=config.seed, identity=text.identity()))
    except PeftuneError as error:
        source = _source(config)
        limit = longest_input(load_model_config(config.model, source), config.data.max_length,
                              virtual_tokens(config.adapter, config.task))
        why = str(error).splitlines()[0]
        lengths = lengths_without_data(limit, config.train.batch_size, config.train.max_steps or 0,
                                       scored=config.data.validation is not None or config.data.test is not None)
        return Known(WITHOUT_DATA[config.task], lengths, _assumed_rows(config, source), 0,
                     f"every example as long as data.max_length, all of it supervised ({why})")
    lengths = lengths_of(config, data)
    return Known(data.targets, lengths, subject_of(config, text, data.targets).rows, text.tokenizer.pad_token_id,
                 f"{counted(len(lengths.tokens), 'example')}, the longest of {counted(lengths.longest, 'token')}")


def _lies_here(data: DataConfig) -> bool:
    """Whether all of it is files: a plan fetches nothing."""
    paths = (source.path for several in needed_sources(data, SPLITS).values() for source in several)
    return all(Path(path).exists() or any(glob.iglob(path, recursive=True)) for path in paths)


def _source(config: RunConfig) -> str:
    name = Path(config.model.name_or_path)
    return str(name.resolve()) if name.suffix == ".json" and name.is_file() else resolve(config.model)


def _assumed_rows(config: RunConfig, source: str) -> NewRows:
    added = len(config.model.added_tokens) + len(config.model.added_special_tokens)
    known = load_model_config(config.model, source).get_text_config().vocab_size
    return NewRows(tuple(range(known, known + added)), known + added, known) if added else NO_ROWS


class Planner:
    """Plans cases of one config and its changes; what two of them share is traced once."""

    def __init__(self, config: RunConfig) -> None:
        """Raises ModelError where the model's config cannot be had."""
        self.known = known_of(config)
        self._tracers: dict[str, Tracer] = {}

    def answer(self, case: Case) -> Answer:
        """Plan a case.

        Raises:
            ModelError: the model's code asks its tensors for values, so that it cannot be planned, or the adapter does
                not fit it.
        """
        device, lengths = case.device, self.known.lengths
        if case.config.data.too_long == "truncate":  # two strings, of a pair or a question, may be longer than that
            lengths = lengths.cut(case.config.data.max_length * (2 if self.known.targets.kind == "pair" else 1))
        room = self._room(device)
        try:
            tracer = self._tracer(case.config)
            choice = choose_memory(tracer, lengths, room_bytes=_room_of_auto(device), division=case.division,
                                   device=replace(device, slack=max(device.slack, device.most_slack)))
            found = footprint_at(tracer, lengths, choice.micro_batch_tokens, recompute=choice.gradient_checkpointing,
                                 division=case.division, device=device)
        except PeftuneError:
            raise  # the adapter does not fit
        except UNTRACEABLE as error:
            raise ModelError(Fault(
                kind="model", message=f"this model cannot be planned: {(str(error).splitlines() or [''])[0][:300]}",
                mend="peftune train CONFIG train.max_steps=2 measures it")) from error
        rate = device.reached * device.flops[case.config.model.dtype] * found.tokens / found.flops * case.division.hands
        total = lengths.steps * case.config.train.batch_size * lengths.mean
        return Answer(case, choice, found, found.peak_bytes <= room, rate, total / rate if total else None)

    def may_fit(self, case: Case) -> bool:
        """Whether the weights alone do; what is not known may."""
        try:
            return self._tracer(case.config).states_bytes(case.division) <= self._room(case.device)
        except UNTRACEABLE:
            return True  # `answer` says why

    @staticmethod
    def _room(device: Device) -> int:
        return int((SHARE if device.on_cpu else 1.0) * device.memory_bytes)

    def _tracer(self, config: RunConfig) -> Tracer:
        key = config.model_dump_json(include={"model", "adapter", "data", "train"}, exclude={
            "model": {"gradient_checkpointing"}, "train": {"tokens_per_micro_batch"}, "data": {"max_length"}})
        if key not in self._tracers:
            source, known = _source(config), self.known
            model_config = adjust_config(load_model_config(config.model, source), dropout=config.model.dropout,
                                         problem=known.targets.problem, names=known.targets.names, pad_id=known.pad_id)
            self._tracers[key] = Tracer(Subject(
                config=config, source=source, model_config=model_config, targets=known.targets, rows=known.rows,
                task=TASKS[config.task](config.train, config.evaluation)))
        return self._tracers[key].under(config)


def _room_of_auto(device: Device) -> int:
    """What a run fills by itself: on GPUs a share of what its context leaves free (see `room_bytes`)."""
    if device.on_cpu:
        return int(SHARE * device.memory_bytes)
    return int(SHARE * (device.memory_bytes - device.framework_bytes)) + device.framework_bytes
