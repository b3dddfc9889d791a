"""Compute what frozen layers give for each example once, before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from peftune.config.schema import ModelConfig
from peftune.data.examples import Batch
from peftune.data.store import Split
from peftune.loop.known_states import StateFile
from peftune.loop.run import Run
from peftune.model.frozen_layers import FrozenLayers, frozen_beginning
from peftune.model.outputs import logits_of
from peftune.model.packing_proof import RELATIVE_TOLERANCE
from peftune.model.precision import DTYPES
from peftune.model.proof import UNPROVEN, why_unproven

PROVEN_EXAMPLES = 4
LEAST_EPOCHS = 2
"""Of a run that saves more by this than it costs."""
SHARE_OF_DISK = 0.5
"""What the files may take of what is free where the run folder lies."""
KEPT_SPLITS = ("train", "validation")
"""Those that are read again and again."""
MIB = 2**20


def remember(run: Run, config: ModelConfig) -> None:
    """Let the run read what its frozen layers give, where that never changes and it pays.

    The states are those of an evaluation's batches, whatever the step they are read in: evaluations stay as they were
    bit for bit, losses up to rounding, and a run that goes on after a stop knows what the unbroken one knew.
    """
    layers, of = frozen_beginning(run.strategy.unwrap(run.model))
    if not layers or not config.reuse_frozen_layers or run.steps < LEAST_EPOCHS * run.plan.steps_per_epoch:
        return
    with run.journal.phase("frozen") as notes:
        why = _unsuited(run, config) or _remembered(run, FrozenLayers(layers), RELATIVE_TOLERANCE[DTYPES[config.dtype]])
        ways = f"computed in each step: {why}" if why else (
            f"computed once for each example, {run.evaluator.known.bytes / MIB:,.1f} MiB on disk until the run ends")
        notes.append(f"{len(layers)} of {of} layers are frozen, and {ways}")


def _unsuited(run: Run, config: ModelConfig) -> str | None:
    if config.dropout != 0:
        return "model.dropout is not 0"
    if config.compiles_whole:
        return "model.compile=true"
    return "several processes deal examples anew in each epoch" if run.strategy.world.ranks > 1 else None


def _remembered(run: Run, layers: FrozenLayers, tolerance: float) -> str | None:
    """None, or why not."""
    run.strategy.world.progress.at("computing the frozen layers")
    model = run.strategy.unwrap(run.model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), run.autocast():
            return _filled(run, layers, [split for name, split in run.data.splits.items() if name in KEPT_SPLITS],
                           tolerance)
    except OSError as error:
        return f"{run.folder}: {error.strerror}"
    finally:
        model.train(was_training)


def _filled(run: Run, layers: FrozenLayers, splits: Sequence[Split], tolerance: float) -> str | None:
    """Prove on a few examples that nothing else depends on the layers, then keep what they give for all."""
    few = _batch(run, splits[0], range(min(PROVEN_EXAMPLES, len(splits[0]))))
    try:
        sample_TD = _hidden(run, layers, few)
        if sample_TD is None:
            return "they give more than hidden states, or weights that train come before them"
        why = _fault(run, layers, few, sample_TD, tolerance) or _lack(run, splits, sample_TD)
    except UNPROVEN as error:
        return why_unproven(error)
    if why is not None:
        return why
    files = [(split, StateFile(run.folder, split.lengths, sample_TD)) for split in splits]
    for split, file in files:
        groups = run.evaluator.batches(split, rank=0, ranks=1)
        for number, positions in enumerate(groups, start=1):
            hidden_TD = _hidden(run, layers, _batch(run, split, positions))
            assert hidden_TD is not None, "as of the few"
            file.write(positions, hidden_TD)
            run.evaluator.progress("frozen layers", number, len(groups))
    run.evaluator.known.keep(layers, files)
    return None


def _batch(run: Run, split: Split, positions: Sequence[int]) -> Batch:
    return run.evaluator.batch([split[i] for i in positions], positions)


def _hidden(run: Run, layers: FrozenLayers, batch: Batch) -> Tensor | None:
    return layers.taken(partial(logits_of, run.strategy.unwrap(run.model), batch.inputs), batch.lengths)


def _fault(run: Run, layers: FrozenLayers, batch: Batch, hidden_TD: Tensor, tolerance: float) -> str | None:
    """What differs where the model starts from these hidden states."""
    task, model = run.evaluator.task, run.strategy.unwrap(run.model)

    def losses() -> Tensor:
        return task.losses(task.forward(model, batch, run.evaluator.reference), batch, run.data.targets)

    plain = losses()
    with layers.given(hidden_TD, batch.lengths):
        deviation = (losses() - plain).abs().max().item()
    if not deviation <= tolerance * plain.abs().max().item():
        return f"losses from their results alone differ by {deviation:.3g}"
    return None


def _lack(run: Run, splits: Sequence[Split], hidden_TD: Tensor) -> str | None:
    """Too little room on the disk."""
    needed = sum(int(split.lengths.sum()) for split in splits) * hidden_TD[0].nbytes
    free = shutil.disk_usage(run.folder).free
    if needed <= SHARE_OF_DISK * free:
        return None
    return f"{needed / MIB:,.0f} MiB, where {free / MIB:,.0f} MiB are free"
