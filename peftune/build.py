"""The only place where names become objects: RunConfig -> Run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftune.build_model import (
    content_of,
    fusion_notes,
    method_of,
    model_facts,
    model_for_training,
    publish,
    recomputes,
    reference_for,
    usual_tolerance,
)
from peftune.config.load import dump
from peftune.config.rules import refuse_broken
from peftune.config.schema import RunConfig
from peftune.data import cache
from peftune.data.batches import BatchPlan
from peftune.data.examples import Batch
from peftune.data.findings import LEAKS
from peftune.data.layouts import PADDED, Layout
from peftune.data.prepare import Prepared, open_prepared, prepare
from peftune.loop.checkpoint import load_checkpoint
from peftune.loop.evaluate import Evaluator
from peftune.loop.finish import measure_baseline
from peftune.loop.layout import choose_layout
from peftune.loop.lock import FolderLock
from peftune.loop.optimizer import build_optimizer
from peftune.loop.publish import write_json, write_text, writing
from peftune.loop.remember import remember
from peftune.loop.resume import Start, find_start, keep_best, refuse_begun, same_model, starts
from peftune.loop.road import road_notes
from peftune.loop.run import Every, Run
from peftune.loop.saver import Saver
from peftune.loop.saving import tidy
from peftune.loop.self_check import check_end_of_text
from peftune.loop.state import TrainState
from peftune.model.adalora import RankBudget, is_adalora, may_set_back
from peftune.model.assemble import count, weight_notes
from peftune.model.division import refuse_undividable
from peftune.model.precision import DTYPES, autocast, uses_autocast
from peftune.model.published import published_weights
from peftune.model.reference import frozen_copy
from peftune.model.save import live_logits, reload_deviation
from peftune.numerics.schedules import learning_rate_factor
from peftune.observe.display import Display
from peftune.observe.journal import Journal
from peftune.observe.manifest import environment
from peftune.observe.trackers import check_trackers, start_trackers
from peftune.out_of_memory import PREPARING, saying_what_takes_less
from peftune.parallel.ddp import Ddp
from peftune.parallel.fsdp2 import open_fsdp2
from peftune.parallel.names import check_launched, launched_kind, sequence_ranks
from peftune.parallel.sequences import SequenceGroup, open_sequences
from peftune.parallel.shared import check_output_is_shared, prepared_on_each_machine
from peftune.parallel.single import Single
from peftune.parallel.stop import Stop
from peftune.parallel.strategy import Strategy
from peftune.parallel.watch import watched_world
from peftune.parallel.world import World
from peftune.parallel.zero import open_zero
from peftune.plan.choose import memory_of_run
from peftune.plan.manifest import memory_facts, memory_note
from peftune.tasks import TASKS, generated
from peftune.tasks.task import chosen_metric
from peftune.tasks.text import Text, data_notes, data_warnings, open_text, quiet_libraries

SHOWN_PLACES = 20
"""Rows of a finding that the manifest names; `peftune check` names more. Of leaks it names all that are known, since
the report scores them apart."""


@dataclass(frozen=True, slots=True)
class Built:
    """A run ready to go on, or the summary of one that is done."""

    run: Run | None
    state: TrainState
    display: Display
    summary: dict[str, Any] | None = None


@contextlib.contextmanager
def build(config: RunConfig, stop: Stop | None = None) -> Iterator[Built]:
    """Start the processes' group, prepare the data, load the model, and find where the run stands.

    Nothing is written into `output_dir` before all of it has succeeded.

    Args:
        config: of the run.
        stop: whether this process has been told to stop; None: nobody tells it.

    Raises:
        PeftuneError: whatever the user can mend.
    """
    quiet_libraries()
    stop = stop or Stop()
    folder = Path(config.output_dir)
    with watched_world(config.hang_timeout_s, stop) as world, FolderLock(folder, config.hang_timeout_s) as lock:
        display = Display(quiet=not world.is_main)
        strategy = open_strategy(config, world)
        division = open_sequences(world)
        world.on_main(lambda: lock.take(world.progress.tick))
        check_trackers(config.log.trackers)
        display.say(f"peftune: {config.task}, {config.model.name_or_path}, {method_of(config)}, "
                    f"{strategy.name} on {world.ranks} x {world.device.type}"
                    + (f", each sequence on {division.ranks}" if division else ""))
        lacking_memory = functools.partial(saying_what_takes_less, config, world, strategy.name)
        with lacking_memory():
            text, data = _data(config, world, display)
        if division is not None:
            refuse_undividable(text.config, division.ranks)
        metric = chosen_metric(text.encoder.task, data.targets, config.evaluation.metric)
        start = world.on_main(lambda: find_start(folder, dump(config), config.resume, data.fingerprints))
        for note in start.notes:
            display.warn(note)
        if start.summary is not None:
            yield Built(None, TrainState(), display, start.summary)
            return
        with lacking_memory():
            run, state = _run(config, world, strategy, display, text, data, start, metric, stop, division, lock)
        try:
            with lacking_memory(run.micro_batch_tokens, run.facts["gradient_checkpointing"]):
                yield Built(run, state, display)
        finally:
            world.progress.ending = True
            run.journal.close()


def open_strategy(config: RunConfig, world: World) -> Strategy:
    """How the launcher's environment wants the processes to share the work.

    Raises:
        ConfigError: this config cannot train that way.
        MachineError: what the strategy needs is missing.
    """
    match launched_kind():
        case "zero":
            strategy: Strategy = open_zero(world, bfloat16=uses_autocast(config.model))
        case "fsdp2":
            strategy = open_fsdp2(world)
        case _:
            strategy = Ddp(world) if world.ranks > 1 else Single(world)
    world.on_main(lambda: check_launched(strategy.name))
    world.on_main(lambda: refuse_broken(config, strategy.name, sequence_ranks()))
    return strategy


def _data(config: RunConfig, world: World, display: Display) -> tuple[Text, Prepared]:
    world.progress.at(PREPARING)
    with display.phase("data") as notes:
        text = open_text(TASKS[config.task](config.train, config.evaluation), config.model, config.data, config.adapter)
        work = functools.partial(prepare, config.data, text.encoder, seed=config.seed, identity=text.identity(),
                                 progress=display.progress)
        data = open_prepared(prepared_on_each_machine(world, work, cache.is_whole))
        if text.encoder.task.converses and config.data.too_long != "split":
            check_end_of_text(data.splits["train"], text.tokenizer.eos_token_id)
        notes += data_notes(data, text, config.data)
    for warning in data_warnings(data):
        display.warn(warning)
    return text, data


def _run(
    config: RunConfig, world: World, strategy: Strategy, display: Display, text: Text, data: Prepared, start: Start,
    metric: str, stop: Stop, division: SequenceGroup | None, lock: FolderLock,
) -> tuple[Run, TrainState]:
    task, targets = text.encoder.task, data.targets
    world.progress.at("loading the model")
    task.import_scoring()
    with display.phase("model") as notes:
        memory = memory_of_run(config, text, data, strategy, division.ranks if division else 1)
        model, loaded = model_for_training(config, text, data, strategy, display.progress)
        counts = count(model)
        memory = replace(memory, gradient_checkpointing=memory.gradient_checkpointing and recomputes(config, model))
        if config.model.compiles_whole:
            model.compile(dynamic=True)
        frozen = (frozen_copy(model, DTYPES[config.model.dtype])
                  if task.needs_reference and config.adapter is None else None)
        wrapped, optimizer = strategy.prepare(model, lambda placed: build_optimizer(placed, config.train))
        layout, why = choose_layout(
            config.data.layout, config.model, model, model.config, pooled=task.pooled, world=world,
            pad_id=text.tokenizer.pad_token_id, longest=data.longest,
            autocast=autocast(config.model, world.device), division=division)
        roads = road_notes(config.model, model, text.config, world=world, divided=strategy.lockstep
                           ) if task.next_token else []
        reference = reference_for(model, frozen, strategy, layout) if task.needs_reference else None
        notes += weight_notes(loaded, counts, config.model.dtype) + fusion_notes(config.model, model) + roads
        anew = ", activations recomputed" if memory.gradient_checkpointing else ""
        notes += [f"{memory.micro_batch_tokens:,} tokens a micro-batch, {layout.name}{why}{anew}", memory_note(memory)]
    folder = Path(config.output_dir)
    facts = {**model_facts(config, loaded, counts, layout), **memory_facts(memory),
             "sequence_ranks": division.ranks if division else 1,
             "content": world.on_main(lambda: same_model(folder, start.checkpoint, content_of(config, text)))}
    torch.manual_seed(config.seed + world.rank)
    state = TrainState() if start.checkpoint is None else load_checkpoint(start.checkpoint, model, optimizer, strategy)
    if start.checkpoint is not None:
        display.say(f"continuing after step {state.step} from {start.checkpoint}")
    world.on_main(writing(folder)(lambda: _open_folder(config, lock, start, state.step, strategy, data, text, facts)))
    check_output_is_shared(world, folder / "manifest.json")
    state = world.on_main(functools.partial(keep_best, state, start.checkpoint, folder, display.warn))
    journal = _journal(config, folder, world, display, keep_rows=start.rows_kept(folder, state))
    evaluator = Evaluator(task, targets, text.tokenizer, world, autocast(config.model, world.device),
                          config.evaluation.max_new_tokens, reference, display.progress, strategy.lockstep, stop,
                          layout if division or layout.equal_lengths else PADDED, warn=display.warn_once)
    run = _assembled_run(config, wrapped, strategy, optimizer, data, layout, evaluator, journal, metric, facts)
    if is_adalora(model):
        RankBudget(model, optimizer, steps=run.steps, done=state.step - state.skipped_steps)
    remember(run, config.model)
    if state.step == 0:
        with display.phase("untrained"):
            state = replace(state, baseline=measure_baseline(run))
    return run, state


def _journal(config: RunConfig, folder: Path, world: World, display: Display, *, keep_rows: int) -> Journal:
    trackers = start_trackers(config.log.trackers, folder, config.model_dump(mode="json")) if world.is_main else ()
    journal = Journal(folder / "metrics.jsonl", device=world.device, is_main=world.is_main, display=display,
                      keep_rows=keep_rows, trackers=trackers)
    if world.is_main and journal.rows < keep_rows:
        journal.warn(f"{folder / 'metrics.jsonl'} has lost {keep_rows - journal.rows} of the {keep_rows} rows so far")
    return journal


def _open_folder(
    config: RunConfig, lock: FolderLock, start: Start, step: int, strategy: Strategy, data: Prepared, text: Text,
    facts: dict[str, Any],
) -> None:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock.take()
    refuse_begun(folder, start)
    tidy(folder)
    write_text(folder / "config.yaml", dump(config))  # first: it says that this is a run's folder
    now = {**environment(strategy.world.device), "strategy": strategy.name, "world_size": strategy.world.ranks}
    write_json(folder / "manifest.json", {
        **now, "starts": starts(start.checkpoint, step, now),
        "model": {"source": text.source, "revision": config.model.revision, "chat_template": text.template,
                  **{key: value for key, value in facts.items() if key != "memory"}},
        "memory": facts["memory"],
        "data": {"fingerprints": data.fingerprints, "formats": data.formats, "classes": list(data.targets.names),
                 "problem": data.targets.problem,
                 "counts": {name: asdict(counts) for name, counts in data.counts.items()},
                 "bad_rows": [str(fault) for fault in data.faults],
                 "findings": [{**asdict(finding), "places": [f"{place.file}:{place.line}: {place.message}"
                                                             for place in finding.places[
                                                                 :None if finding.kind in LEAKS else SHOWN_PLACES]]}
                              for finding in data.findings]},
    })


def _assembled_run(
    config: RunConfig, model: nn.Module, strategy: Strategy, optimizer: torch.optim.Optimizer, data: Prepared,
    layout: Layout, evaluator: Evaluator, journal: Journal, metric: str, facts: dict[str, Any],
) -> Run:
    train, task, targets = config.train, evaluator.task, evaluator.targets
    split = data.splits["train"]
    lengths = split.padded_lengths if layout.kind == "padded" else split.lengths
    plan = BatchPlan(lengths, split.source, data.weights, train.batch_size, config.seed)
    steps = plan.steps(train.num_epochs, train.max_steps)

    def losses(live: nn.Module, batch: Batch) -> Tensor:
        with evaluator.known.of(split, batch):
            return task.losses(task.forward(live, batch, evaluator.reference), batch, targets)

    return Run(
        folder=Path(config.output_dir), model=model, strategy=strategy, optimizer=optimizer,
        learning_rate=lambda step: train.learning_rate * learning_rate_factor(
            train.lr_scheduler, step, steps, train.warmup_ratio),
        losses=losses, autocast=evaluator.autocast, data=data, plan=plan, layout=layout, evaluator=evaluator,
        journal=journal, publish=functools.partial(publish, config, facts, evaluator.tokenizer),
        published_weights=published_weights,
        live_logits=functools.partial(live_logits, autocast=evaluator.autocast),
        reload_deviation=functools.partial(
            reload_deviation, auto_class=task.auto_class, divided=strategy.lockstep,
            autocast=lambda device: autocast(config.model, device)(),
            trust_remote_code=config.model.trust_remote_code, quantization=config.model.quantization),
        reload_tolerance=usual_tolerance(config, strategy),
        steps=steps, micro_batch_tokens=facts["micro_batch_tokens"], max_grad_norm=train.max_grad_norm,
        max_skipped_steps=train.max_skipped_steps, metric=metric,
        patience=config.evaluation.patience, generate_every_time=task.generates and metric in generated.NAMES,
        log=Every(config.log.every_steps), evaluation=Every(config.evaluation.every_steps or plan.steps_per_epoch),
        checkpoint=Every(config.checkpoint.every_steps or plan.steps_per_epoch),
        saver=Saver(Path(config.output_dir), strategy, config_yaml=dump(config), keep=config.checkpoint.keep,
                    asynchronous=config.checkpoint.asynchronous),
        set_back=functools.partial(may_set_back, strategy.unwrap(model)),
        stop=evaluator.stop, facts=facts,
    )
