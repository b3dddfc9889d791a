"""The end of a run: the final scores, the published model proven to reload, the summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftune.data.examples import Example, TargetKind
from peftune.data.layouts import lay_out
from peftune.data.store import Part
from peftune.errors import Fault, SelfCheckError
from peftune.loop.evaluate import Scored, evaluate
from peftune.loop.judge import judge, require_metric
from peftune.loop.publish import published, refuse_vanished, write_json, write_text, writing
from peftune.loop.run import Run
from peftune.loop.saving import leave
from peftune.loop.self_check import check_weights
from peftune.loop.state import TrainState
from peftune.model.adapters import has_adapter
from peftune.model.outputs import places, takes_places
from peftune.parallel.host_memory import return_free_memory
from peftune.parallel.stop import StopAgreed
from peftune.tasks.task import Record

CHECKED_EXAMPLES = 4
CHECKED_TOKENS = 1024
"""Of each example: logits of all tokens of a long one may fit no device, and these say as much."""
USUAL_LOGIT = 10.0
SCORED_SPLITS = ("validation", "test")
TRAIN_PART_ROWS = 500
"""Training rows that are scored like the other splits, to say what the model knows by heart; no more than the largest
of those has."""
HIDDEN_KEYS = ("position", "prompt_length", "words")


def measure_baseline(run: Run) -> dict[str, Any]:
    """Metrics of the model before training, and of the guess that never reads its input, by split."""
    baseline: dict[str, Any] = {}
    majority: dict[str, Any] = {}
    for name in SCORED_SPLITS:
        if name in run.data.splits:
            scored = _score(run, name)
            if name == "validation":
                require_metric(run.metric, scored)
            baseline[name] = scored.metrics
            if run.evaluator.task.majority is not None:
                guessed = run.evaluator.task.majority(
                    run.data.splits["train"].records(), scored.records, run.data.targets)
                metrics = run.evaluator.task.metrics(guessed, run.data.targets, False)
                majority[name] = {key: value for key, value in metrics.items() if key != "loss"}
            run.journal.evaluation_row(TrainState(), name, scored.metrics, epoch=0.0)
    return {"untrained": baseline, "majority": majority}


def finish(run: Run, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Score and publish the last weights, then score `best` if it is another step.

    Returns:
        The state with the last evaluation judged, and the summary, which is also on disk as summary.json.

    Raises:
        SelfCheckError: the published folder does not reload to the same logits; nothing is published then.
        Preempted: the ranks have agreed to stop; the next start does the end of the run again.
        Unwritable: the disk refuses; the same.
    """
    with run.journal.phase("save") as notes:
        deviation = publish_final(run)
        notes.append(f"final/ reloads: its logits differ by {deviation:.2g}")
    try:
        with run.journal.phase("score") as notes:
            state, scores = _last_scores(run, state)
            notes.append(", ".join(scores["metrics"]) or "nothing: there are no held-out rows")
    except StopAgreed:
        leave(run, state)
    summary = _summary(run, state, scores, deviation)
    run.strategy.world.on_main(lambda: _write_summary(run, summary))
    return state, summary


def _write_summary(run: Run, summary: dict[str, Any]) -> None:
    with writing(run.folder):
        run.journal.flush()
        write_json(run.folder / "summary.json", summary)


def _last_scores(run: Run, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Of the last weights, also on rows they have learned from, and, if they are another step's, of the best."""
    metrics: dict[str, Any] = {}
    for name in SCORED_SPLITS:
        if name in run.data.splits:
            scored = _score(run, name)
            metrics[name] = scored.metrics
            write_predictions(run.folder / "predictions" / f"{name}.jsonl", scored.records, run)
            if name == "validation":
                state = judge(run, state, scored)
            else:
                run.journal.evaluation_row(state, name, scored.metrics, epoch=run.epochs_of(state.step))
    train_part = _score_train_part(run) if metrics else {}
    best: dict[str, Any] = {}
    if state.best_step not in (None, state.step):
        _put_back(run, "best")
        best = {name: _score(run, name).metrics for name in metrics}
        _put_back(run, "final")
    return state, {"metrics": metrics, "best": best or metrics, "train_part": train_part}


def publish_final(run: Run) -> float:
    """Write final/ and prove that it reloads; return the largest deviation of its logits."""
    run.strategy.world.progress.at("publishing final/")
    return_free_memory(run.strategy.world.device.type)
    model, split = run.strategy.unwrap(run.model), run.data.splits.get("validation", run.data.splits["train"])
    positions = list(range(min(CHECKED_EXAMPLES, len(split))))
    examples = [_beginning(split[i], run.data.targets.kind) for i in positions]
    inputs = lay_out(examples, positions, pad_id=run.evaluator.tokenizer.pad_token_id, kind=run.data.targets.kind,
                     width=run.data.targets.width, device=run.strategy.world.device).inputs
    if takes_places(model):
        inputs["logits_to_keep"] = torch.tensor(places(inputs["input_ids"].shape[1]), device=run.strategy.world.device)
    check_weights(model, run.strategy)
    weights = run.strategy.gather(model, frozen=not has_adapter(model))
    logits = run.live_logits(model, inputs)
    return run.strategy.world.on_main(lambda: _publish_and_reload(run, model, weights, inputs, logits))


def _beginning(example: Example, kind: TargetKind) -> Example:
    """The first tokens of an example that has a target for each."""
    if kind != "token":
        return example
    segments = example.segment_ids
    return replace(example, input_ids=example.input_ids[:CHECKED_TOKENS], targets=example.targets[:CHECKED_TOKENS],
                   segment_ids=None if segments is None else segments[:CHECKED_TOKENS])


def _publish_and_reload(
    run: Run, model: nn.Module, weights: dict[str, Tensor], inputs: dict[str, Tensor], logits: Tensor
) -> float:
    refuse_vanished(run.folder)
    with published(run.folder / "final") as draft:
        run.publish(model, weights, draft)
        deviation = run.reload_deviation(model, draft, inputs, logits)
        tolerance = reload_tolerance(run.reload_tolerance, logits)
        if not deviation <= tolerance:
            raise SelfCheckError(Fault(
                kind="self_check", message=f"what was saved does not reload: logits differ by {deviation:.3g} "
                f"(tolerance {tolerance:.1g}); final/ was not published",
                mend="the last checkpoint holds the training; report this with the config",
            ))
    return deviation


def reload_tolerance(usual: float, logits: Tensor) -> float:
    """How far reloaded logits may lie from these. `usual` holds up to a largest logit of `USUAL_LOGIT`: rounding grows
    with what is rounded, and large models have logits of 30 and more. Those that a model masks say nothing of that."""
    return usual * (logits.abs().max() / USUAL_LOGIT).clamp(1.0, 10.0).item()


def _put_back(run: Run, name: str) -> None:
    """The weights of a published folder, into the live model."""
    model, world = run.strategy.unwrap(run.model), run.strategy.world
    run.strategy.scatter(model, run.published_weights(model, run.folder / name) if world.is_main else {})


def write_predictions(path: Path, records: Sequence[Record], run: Run) -> None:
    """One JSON line an example, in order of the split. All ranks call it."""

    def write() -> None:
        with writing(path):
            write_text(path, prediction_lines(records))

    run.strategy.world.on_main(write)


def prediction_lines(records: Sequence[Record]) -> str:
    """Records as JSON lines: id, prediction and reference first."""
    return "".join(json.dumps(shown(record), ensure_ascii=False) + "\n" for record in records)


def prediction_table(records: Sequence[Record]) -> str:
    """Records as CSV: the same values, lists and records among them as JSON, what is absent as nothing."""
    rows = [{key: value if isinstance(value, str | int | float | None) else json.dumps(value, ensure_ascii=False)
             for key, value in shown(record).items()} for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shown(record: Record) -> dict[str, Any]:
    """A record as people get it: id, prediction and reference first, what only the harness needs left out."""
    first = {"id": record.get("id"), "prediction": record.get("prediction"), "reference": record.get("reference")}
    return first | {key: value for key, value in record.items() if key not in HIDDEN_KEYS and key not in first}


def _score(run: Run, name: str) -> Scored:
    return evaluate(run.evaluator, run.strategy.unwrap(run.model), run.data.splits[name], name=name,
                    intervals=True, generate=True)


def _score_train_part(run: Run) -> dict[str, Any]:
    """Metrics of some training rows, with the last weights."""
    largest = max(len(run.data.splits[name]) for name in SCORED_SPLITS if name in run.data.splits)
    part = Part(run.data.splits["train"], min(TRAIN_PART_ROWS, largest))
    scored = evaluate(run.evaluator, run.strategy.unwrap(run.model), part, name="train part", intervals=True,
                      generate=run.generate_every_time)
    return {"rows": len(scored.records), "metrics": scored.metrics}


def _summary(run: Run, state: TrainState, scores: dict[str, Any], deviation: float) -> dict[str, Any]:
    early = state.stopped_early and state.step < run.steps
    return {
        "task": run.facts["task"], "exit": "stopped_early" if early else "done",
        "steps": state.step, "skipped_steps": state.skipped_steps, "examples": state.examples, "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens, "seconds": state.seconds,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "peak_memory_bytes": run.journal.peak_memory_bytes(), "memory": _memory(run),
        "trainable_parameters": run.facts["trainable_parameters"],
        "total_parameters": run.facts["total_parameters"],
        "strategy": run.strategy.name, "world_size": run.strategy.world.ranks,
        "metric": run.metric, "best_step": state.best_step, **scores,
        "baseline": state.baseline.get("untrained", {}),
        "majority": state.baseline.get("majority", {}), "reload_deviation": deviation,
    }


def _memory(run: Run) -> dict[str, Any]:
    """Predicted before the weights were loaded, and measured, above what the process held then."""
    planned = run.facts["memory"]
    predicted = planned["predicted"] or {}
    return {"predicted_bytes": predicted.get("peak_bytes"), "predicted_instant": predicted.get("peak_instant"),
            "measured_bytes": run.journal.peak_memory_bytes() - planned["baseline_bytes"]}
