"""`peftune check`: every fault of config, model name and data, and what looks wrong, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from peftune.config.rules import strategy_faults
from peftune.config.schema import RunConfig
from peftune.config.sequence_rules import sequence_faults
from peftune.data.examples import Example
from peftune.data.findings import as_faults
from peftune.data.prepare import Prepared, open_prepared, prepare, row_faults
from peftune.data.store import Split
from peftune.data.targets import Targets
from peftune.errors import KEPT_FAULTS, DataError, Fault, PeftuneError, beyond, faults_of
from peftune.loop.resume import refuse_unusable
from peftune.model.adapters import virtual_tokens
from peftune.model.division import refuse_undividable
from peftune.model.hollow import hollow_model
from peftune.model.load import require_attention
from peftune.model.quantize import quantization_of, require_bitsandbytes
from peftune.numerics.counted import counted
from peftune.numerics.losses import IGNORE
from peftune.observe.display import Display, Piece
from peftune.observe.trackers import check_trackers
from peftune.plan.choose import UNTRACEABLE, subject_of
from peftune.tasks import TASKS
from peftune.tasks.task import chosen_metric
from peftune.tasks.text import Text, open_text, quiet_libraries

SHOWN_PLACES = 3
SHOWN_ERRORS = 20
BARS = 12
DIVIDED = ("zero3", "fsdp2")
"""Beginnings of the names of strategies that divide each weight."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found. The data and the text side are there unless a fault kept them from being opened."""

    faults: list[Fault]
    """Errors, and one warning for each place of each finding."""
    data: Prepared | None = None
    text: Text | None = None


def check(config: RunConfig, strategy: str | None = None, sequence_ranks: int = 1) -> Checked:
    """Look at trackers, adapter fields, model name, tokenizer and data, without loading weights.

    The adapter is attached to a model without values, once nothing else is wrong.

    With a strategy, also at what it cannot do, and with several ranks to share a sequence at what they cannot.

    Where the tokenizer cannot be had, the rows are still read and their faults said.
    """
    quiet_libraries()
    task = TASKS[config.task](config.train, config.evaluation)
    faults = [fault for look in (
        lambda: check_trackers(config.log.trackers), lambda: refuse_unusable(Path(config.output_dir), config.resume),
        lambda: require_attention(config.model.attention)) for fault in faults_of(look)]
    if strategy is not None:
        faults += strategy_faults(config, strategy)
    faults += sequence_faults(config, sequence_ranks)
    prompt: list[int] = []
    if (adapter := config.adapter) is not None:
        adds_tokens = bool(config.model.added_tokens or config.model.added_special_tokens)
        faults += faults_of(lambda: prompt.append(virtual_tokens(adapter, config.task, adds_tokens=adds_tokens)))
    if config.train.optimizer.endswith("8bit"):
        faults += faults_of(lambda: require_bitsandbytes(f"train.optimizer = {config.train.optimizer!r}"))
    opened: list[tuple[Prepared, Text]] = []
    model: list[Fault] = []

    def open_data() -> None:
        text = open_text(task, config.model, config.data).behind(prompt[0] if prompt else 0)
        model.extend(faults_of(lambda: quantization_of(
            config.model, text.config, adapted=config.adapter is not None,
            divided=(strategy or "").startswith(DIVIDED))))
        if sequence_ranks > 1:
            model.extend(faults_of(lambda: refuse_undividable(text.config, sequence_ranks)))
        folder = prepare(config.data, text.encoder, seed=config.seed, identity=text.identity(), inspect=True)
        opened.append((open_prepared(folder), text))
        chosen_metric(task, opened[0][0].targets, config.evaluation.metric)
        if config.adapter is not None and not faults + model:
            model.extend(faults_of(lambda: _attach(config, text, opened[0][0].targets)))

    found = faults_of(open_data)
    faults += model
    if not opened:
        if any(fault.kind != "data" for fault in found):
            found += faults_of(lambda: _raise(row_faults(config.data, task.formats, config.seed)))
        return Checked(faults + found)
    data, text = opened[0]
    severity: Literal["error", "warning"] = "error" if config.data.on_bad_row == "error" else "warning"
    found += [replace(fault, severity=severity) for fault in data.faults]
    found += as_faults(data.findings, "warning")
    return Checked(faults + found, data, text)


def _attach(config: RunConfig, text: Text, targets: Targets) -> None:
    """Attach the adapter to the model without values.

    Raises:
        ConfigError, ModelError: it does not fit.
    """
    subject = subject_of(config, text, targets)
    try:
        hollow_model(config.model, config.adapter, subject.source, subject.model_config, subject.task.auto_class,
                     task=config.task, new_head=subject.task.new_head, rows=subject.rows)
    except PeftuneError:
        raise
    except UNTRACEABLE:
        return  # the model or the adapter's start asks for values: training says whether it fits


def _raise(faults: list[Fault]) -> None:
    if faults:
        raise DataError(faults)


def as_json(checked: Checked) -> dict[str, Any]:
    """For `--json`: faults with their places, findings with their counts, what became of the rows, and lengths."""
    data = checked.data
    found: dict[str, Any] = {"faults": [fault.as_json() for fault in checked.faults]}
    if data is not None:
        found |= {
            "findings": [{key: value for key, value in asdict(finding).items() if key != "places"}
                         for finding in data.findings],
            "data": {name: asdict(counts) for name, counts in data.counts.items()},
            "lengths": {name: _quantiles(split) for name, split in data.splits.items()},
        }
    return found


def show(checked: Checked, display: Display, name: str, max_length: int) -> None:
    """Say it to a person: errors, then what became of the rows, then what looks wrong with the first places."""
    errors = [fault for fault in checked.faults if fault.severity == "error"]
    for fault in errors[:SHOWN_ERRORS]:
        display.alarm(f"error: {fault}")
    if len(errors) > SHOWN_ERRORS:
        there = "them all" if len(errors) < KEPT_FAULTS else f"the first {KEPT_FAULTS:,} of rows"
        display.alarm(f"... and {beyond(len(errors), SHOWN_ERRORS)} more errors; --json has {there}")
    data = checked.data
    if data is not None:
        _show_counts(data, display)
        for split_name, split in data.splits.items():
            _show_lengths(split_name, split, display, max_length)
        bad = sum(counts.bad for counts in data.counts.values())
        if bad and not errors:
            display.warn(f"{bad:,} bad rows are left out (data.on_bad_row = skip)")
        for finding in data.findings:
            display.warn(finding.message)
            for place in finding.places[:SHOWN_PLACES]:
                display.say(f"      {place.file}:{place.line}: {place.message}")
            if finding.count > SHOWN_PLACES and finding.kind not in ("imbalance", "few_examples"):
                display.say(f"      ... and {finding.count - SHOWN_PLACES:,} more")
            display.say(f"      mend: {finding.mend}")
    findings = 0 if data is None else len(data.findings)
    display.say(f"{name}: {beyond(len(errors), 0) if errors else 'no'} error{'s' * (len(errors) != 1)}, "
                f"{findings or 'no'} warning{'s' * (findings != 1)}")


def _show_counts(data: Prepared, display: Display) -> None:
    names = [key for key in asdict(next(iter(data.counts.values())))
             if key in ("rows", "kept", "tokens", "longest") or any(asdict(c)[key] for c in data.counts.values())]
    display.table("rows", ["", *(key.replace("_", " ") for key in names)],
                  [[split, *(f"{asdict(counts)[key]:,}" for key in names)] for split, counts in data.counts.items()])


def _quantiles(split: Split) -> dict[str, int]:
    lengths = split.full_lengths()
    return {"median": int(np.median(lengths)), "p90": int(np.quantile(lengths, 0.9)),
            "p99": int(np.quantile(lengths, 0.99)), "longest": int(lengths.max())}


def _show_lengths(name: str, split: Split, display: Display, max_length: int) -> None:
    """A histogram of tokens an example; the bins end at round numbers and beyond max_length there is one."""
    lengths = split.full_lengths()
    top = min(int(lengths.max()), max_length)
    width = max(1, -(-top // BARS))
    edges = [*range(0, top, width), top]
    counts = [int(((lengths > low) & (lengths <= high)).sum()) for low, high in pairwise(edges)]
    labels = [f"{low + 1:>6,} - {high:,}" for low, high in pairwise(edges)]
    if (lengths > top).any():
        counts.append(int((lengths > top).sum()))
        labels.append(f"{top + 1:>6,} and more: too long")
    said = ", ".join(f"{key} {value:,}" for key, value in _quantiles(split).items())
    display.bars(f"{name}: tokens an example ({said})", labels, counts)


def show_examples(checked: Checked, display: Display, count: int) -> None:
    """Print the first training examples as the model sees them, with what is learned of them marked."""
    if checked.data is None or checked.text is None:
        return
    split = checked.data.splits["train"]
    for position in range(min(count, len(split))):
        example = split[position]
        display.say(f"-- {example.record['source']}: {counted(len(example.input_ids), 'token')}, "
                    f"{counted(example.num_targets, 'target')}")
        display.pieces(pieces_of(example, checked.data, checked.text))


def pieces_of(example: Example, data: Prepared, text: Text) -> list[Piece]:
    """The text of an example in runs of tokens that are learned or not; a note says the class of a learned run."""
    tokenizer, targets = text.tokenizer, data.targets
    ids, wanted = list(example.input_ids), list(example.targets)
    if targets.kind in ("class", "values"):
        return [Piece(tokenizer.decode(ids), False), Piece("", False, str(example.record["reference"]))]
    marks: list[tuple[bool, str]] = []
    inside = False
    for target in wanted:
        if targets.problem.startswith("answer"):
            inside = inside or target in (1, 3)
            marks.append((inside, ""))
            inside = inside and target not in (2, 3)
        else:
            marks.append((target != IGNORE, targets.names[int(target)] if targets.names and target >= 0 else ""))
    runs = _runs(ids, marks, bool(targets.names))
    return [Piece(tokenizer.decode(run), learned, note) for run, learned, note in runs]


def _runs(
    ids: Sequence[int], marks: Sequence[tuple[bool, str]], one_by_one: bool
) -> list[tuple[list[int], bool, str]]:
    runs: list[tuple[list[int], bool, str]] = []
    for token, (learned, note) in zip(ids, marks, strict=True):
        if runs and runs[-1][1:] == (learned, note) and not (one_by_one and learned):
            runs[-1][0].append(token)
        else:
            runs.append(([token], learned, note))
    return runs
