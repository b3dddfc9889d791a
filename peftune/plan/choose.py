"""`auto` settings: the largest micro-batch that fits, and recomputed activations where one example would not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from peftune.config.rules import keeps_activations
from peftune.config.schema import ModelConfig, RunConfig
from peftune.data.prepare import Prepared
from peftune.data.targets import Targets
from peftune.errors import in_a_line
from peftune.loop.road import rows_at_once
from peftune.model.division import longest_row_matters
from peftune.model.load import adjust_config, local_source
from peftune.model.precision import DTYPES
from peftune.model.vocabulary import new_rows
from peftune.numerics.few_shapes import makes_code_slowly, takes_few_sizes
from peftune.numerics.products import lacks_bfloat16
from peftune.parallel.host_memory import MOST_SLACK, allocator, free_bytes
from peftune.parallel.names import BY_MODULE, preset_of, processes_here
from peftune.parallel.strategy import Strategy
from peftune.plan.devices import GPU_SLACK, Device
from peftune.plan.divide import Division
from peftune.plan.footprint import Footprint, Tracer, footprint
from peftune.plan.models import Road, Subject
from peftune.plan.work import Lengths, lengths_of, packs, work_of
from peftune.tasks.text import Text

LARGEST_AUTO_TOKENS = 16_384
CPU_AUTO_TOKENS = 4_096
"""More tokens at once do not make a CPU faster; they only cost memory."""
SHARE = 0.92
"""Of the memory that can be had, what a plan may fill: the system's caches move by the rest."""
BESIDE_TENSORS = {"float32": 80 * 2**20, "bfloat16": 224 * 2**20}
"""What a run on a CPU adds to its process beside tensors, in bytes by `model.dtype`: code that oneDNN makes for shapes,
pages of libraries, Python's objects, the plan itself."""
MORE_CODE = 96 * 2**20
"""What bfloat16's are more, in bytes, where code for twice as many shapes is kept (`keep_few_products`)."""
COMPILER = 96 * 2**20
"""What model.compile=parts adds, in bytes: torch.compile's libraries stay in the process."""
WIDENED = 32 * 2**20
"""What float32's are more, in bytes, where bfloat16 is multiplied in float32: factors as they are widened."""
REFINEMENTS = 6
AIM = 0.98
"""Share of the room that a micro-batch is to fill: what aims at all of it mostly exceeds it."""
TENSORS = {"cpu": Device("cpu", 0, {}, 0, 0.0, 1.0), "cuda": Device("cuda", 0, {}, 0, 0.0, 1.0)}
"""A run's own device: what it stores of its plan are tensors alone."""
UNTRACEABLE = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)
"""What a model's own code raises where it asks tensors without values for values."""


@dataclass(frozen=True, slots=True)
class MemoryChoice:
    """What `auto` became."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    predicted: Footprint | None
    """None where the model's code cannot be traced."""
    why_not: str = ""
    baseline_bytes: int = 0
    """What the process holds before the weights are loaded: libraries and data. On GPUs nothing."""


def subject_of(config: RunConfig, text: Text, targets: Targets) -> Subject:
    """What is planned, from what is known before weights are loaded. Leaves `text.config` as it is."""
    adjusted = adjust_config(copy.deepcopy(text.config), dropout=config.model.dropout, problem=targets.problem,
                             names=targets.names, pad_id=text.tokenizer.pad_token_id)
    return Subject(config=config, source=local_source(text.source), model_config=adjusted, task=text.encoder.task,
                   targets=targets, rows=new_rows(text.tokenizer, config.model))


def memory_of_run(config: RunConfig, text: Text, data: Prepared, strategy: Strategy, sharing: int) -> MemoryChoice:
    """Resolve `tokens_per_micro_batch: auto` and `gradient_checkpointing: auto` before the weights are loaded.

    All ranks call it: the one with the least memory decides, and the main process plans. `sharing`: ranks that share
    each sequence.
    """
    world = strategy.world
    room = -world.largest(-room_bytes(world.device, config.model))
    return world.on_main(lambda: _memory_of_run(config, text, data, strategy, sharing, room))


def _memory_of_run(
    config: RunConfig, text: Text, data: Prepared, strategy: Strategy, sharing: int, room: int
) -> MemoryChoice:
    lengths, division = lengths_of(config, data), Division(preset_of(strategy.name), strategy.world.ranks, sharing)
    device = strategy.world.device
    tensors = TENSORS[device.type]
    held = replace(tensors, slack=MOST_SLACK[allocator()] if device.type == "cpu" else GPU_SLACK)
    try:
        tracer = Tracer(subject_of(config, text, data.targets))
        found = choose_memory(tracer, lengths, room_bytes=room, division=division, device=held)
        found = replace(found, predicted=footprint_at(
            tracer, lengths, found.micro_batch_tokens, recompute=found.gradient_checkpointing, division=division,
            device=tensors))
    except UNTRACEABLE as error:
        tokens = config.train.tokens_per_micro_batch
        return MemoryChoice(lengths.longest if tokens == "auto" else tokens, wants_recomputing(config) is not False,
                            None, in_a_line(error))
    return replace(found, baseline_bytes=psutil.Process().memory_info().rss if device.type == "cpu" else 0)


def choose_memory(
    tracer: Tracer, lengths: Lengths, *, room_bytes: int, division: Division, device: Device
) -> MemoryChoice:
    """The settings of the config where it has some; else solved from the plan.

    Args:
        tracer: of what is planned.
        lengths: of the examples.
        room_bytes: what a rank's step may take.
        division: strategy and ranks.
        device: on a CPU, more tokens than some do not help.
    """
    config = tracer.subject.config
    wanted, checkpointing = config.train.tokens_per_micro_batch, wants_recomputing(config)
    most = division.sharing * (CPU_AUTO_TOKENS if device.on_cpu else LARGEST_AUTO_TOKENS)
    of_a_rank = lengths.longest * -(-config.train.batch_size // division.hands)
    top = wanted if wanted != "auto" else max(lengths.longest, min(most, of_a_rank))
    low = wanted if wanted != "auto" else lengths.longest
    roads = (False, True) if checkpointing is None else (checkpointing,)
    measure = functools.cache(functools.partial(footprint_at, tracer, lengths, division=division, device=device))

    def size_of(tokens: int, *, recompute: bool) -> int:
        return step_bytes(measure(tokens, recompute=recompute))

    for recompute in roads if tracer.states_bytes(division) <= room_bytes else ():
        tokens = largest_that_fits(functools.partial(size_of, recompute=recompute), low, top, room_bytes)
        if tokens is not None:
            return MemoryChoice(tokens, recompute, measure(tokens, recompute=recompute))
    return MemoryChoice(low, roads[-1], measure(low, recompute=roads[-1]))


def footprint_at(
    tracer: Tracer, lengths: Lengths, tokens: int, *, recompute: bool, division: Division, device: Device
) -> Footprint:
    """What a rank holds with `tokens` a micro-batch."""
    config = tracer.subject.config
    rows = rows_at_once(config.model, tracer.subject.model_config, torch.device("cpu" if device.on_cpu else "cuda"),
                        divided=division.weights_too)
    few_sizes = takes_few_sizes(DTYPES[config.model.dtype], on_cpu=device.on_cpu, divided=division.sharing > 1)
    packed = packs(config) and not longest_row_matters(tracer.subject.model_config, lengths.longest)
    road = Road(recompute, packed, rows, division.sharing, division.strategy in BY_MODULE, few_sizes)
    road = replace(road, packed=tracer.packs(road))
    work = work_of(lengths, tokens, batch_size=config.train.batch_size, ranks=division.hands, packed=road.packed,
                   new_tokens=config.evaluation.max_new_tokens if tracer.subject.task.generates else 0)
    return footprint(tracer.line(work, road), division, device)


def largest_that_fits(size_of: Callable[[int], int], low: int, top: int, room: int) -> int | None:
    """Tokens from `low` to `top` that fill the room to `AIM`, or nearly; None where `low` does not fit.

    Sizes are near a straight line in the tokens: bent up where another instant becomes the peak, and down where as many
    logits exist as ever do at once. So a chord's end is tried; where the same end of it moves twice, the other one
    counts half (the Illinois method: Dowell and Jarratt, 1971).

    Args:
        size_of: tokens -> bytes; never falls.
        low, top: tokens.
        room: bytes.
    """
    if (most := size_of(top)) <= room:
        return top
    if (least := size_of(low)) > room:
        return None
    fits, exceeds, last = low, top, ""
    lack, excess = AIM * room - least, most - AIM * room
    for _ in range(REFINEMENTS):
        guess = fits + int((exceeds - fits) * lack / (lack + excess))
        if guess <= fits:
            break
        size = size_of(guess)
        if size <= room:
            if size >= (2 * AIM - 1) * room:
                return guess
            fits, lack, excess = guess, AIM * room - size, excess / 2 if last == "fits" else excess
            last = "fits"
        else:
            exceeds, excess, lack = guess, size - AIM * room, lack / 2 if last == "exceeds" else lack
            last = "exceeds"
    return fits


def step_bytes(found: Footprint) -> int:
    """Peak within a step."""
    return round(sum(found.instants["step"].values()))


def wants_recomputing(config: RunConfig) -> bool | None:
    """None leaves it to the memory, but where recomputation cannot work (see `RULES`)."""
    if keeps_activations(config):
        return False
    return None if config.model.gradient_checkpointing == "auto" else config.model.gradient_checkpointing


def room_bytes(device: torch.device, config: ModelConfig) -> int:
    """What this rank's tensors may take: a share of the free memory; on CPUs of PEFTUNE_MEMORY_BYTES, if that is
    less.

    Raises:
        MachineError: that is no number.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and free
        return int(SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    most = free_bytes(processes_here())
    widens = config.dtype == "bfloat16" and lacks_bfloat16()
    beside = BESIDE_TENSORS["float32"] + WIDENED if widens else BESIDE_TENSORS[config.dtype]
    beside += MORE_CODE if makes_code_slowly(DTYPES[config.dtype]) else 0
    beside += COMPILER if config.compile == "parts" else 0
    return int(SHARE * most) - beside
