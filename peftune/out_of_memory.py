"""A lack of memory, said as what was being done, what was wanted, and the settings that take less."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from peftune.config.rules import RULES, strategy_faults
from peftune.config.schema import RunConfig
from peftune.errors import Fault, OutOfMemory, out_of_memory
from peftune.parallel.names import preset_of
from peftune.parallel.world import World

PREPARING = "preparing the data"
DIVIDING_NOTHING = ("single", "ddp", "zero1", "zero2")
"""Strategies of which each device holds all weights."""
MEND = "what costs least first; `peftune plan CONFIG.yaml` says how much each takes"
ASKED_TOKENS = 1024
"""To try where nobody has chosen a number of tokens yet."""


@contextlib.contextmanager
def saying_what_takes_less(
    config: RunConfig, world: World, strategy: str, tokens: int | None = None, recomputing: bool | None = None
) -> Iterator[None]:
    """Around what may need more memory than there is.

    Args:
        config: of the run.
        world: says what is being done.
        strategy: as launched.
        tokens: of a micro-batch; None before `auto` has become a number.
        recomputing: whether activations are; None before that is known.

    Raises:
        OutOfMemory: instead of what the libraries raise.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        doing = world.progress.doing
        which = f", rank {world.rank} of {world.ranks} on {socket.gethostname()}" if world.ranks > 1 else ""
        wanted = " ".join(str(error).split())[:200] or type(error).__name__
        mend = "\n    ".join([MEND, *lighter(config, doing, strategy, world.ranks, tokens, recomputing)])
        raise OutOfMemory(Fault(kind="environment", message=f"{doing}{which}: {wanted}", mend=mend)) from error


def lighter(
    config: RunConfig, doing: str, strategy: str, ranks: int, tokens: int | None, recomputing: bool | None
) -> list[str]:
    """Settings that take less memory than these, what costs least first; what each costs in brackets."""
    if doing == PREPARING:
        return ["data.train: {path: ..., max_rows: ...} (fewer rows)", "a machine with more memory"]
    given = config.train.tokens_per_micro_batch
    fewer = tokens // 2 if tokens else ASKED_TOKENS if given == "auto" else given // 2
    recomputing = config.model.gradient_checkpointing is True if recomputing is None else recomputing
    more: list[tuple[bool, str, Any, str]] = [
        (doing.startswith("saving"), "checkpoint.asynchronous", False, "steps wait for the disk"),
        (fewer > 0, "train.tokens_per_micro_batch", fewer, "smaller pieces; the same result"),
        (not recomputing, "model.gradient_checkpointing", True, "activations are computed twice; the same result"),
        (config.model.dtype == "float32", "model.dtype", "bfloat16", "rounded weights and products"),
        (config.train.optimizer == "adamw", "train.optimizer", "adamw_8bit", "its state is rounded to 8 bits"),
        (config.adapter is None, "adapter.method", "lora", "instead of all weights"),
        (config.model.quantization == "none", "model.quantization", "nf4", "the frozen weights in 4 bits"),
        (config.data.max_length > 1, "data.max_length", config.data.max_length // 2, "longer examples are cut"),
    ]
    result = [f"{key}={str(value).lower()} ({costs})" for helps, key, value, costs in more
              if helps and _allowed(config, key, value, strategy)]
    if preset_of(strategy) in DIVIDING_NOTHING and not strategy_faults(config, "fsdp2"):
        result.append(f"--strategy fsdp2 --processes {max(2, ranks)} (more devices, which share the weights)")
    return result


def _allowed(config: RunConfig, key: str, value: Any, strategy: str) -> bool:
    section, name = key.split(".")
    values = config.model_dump()
    values[section] = {**(values[section] or {}), name: value}
    changed = RunConfig.model_validate(values)
    return not any(rule.broken_by(changed) for rule in RULES) and not strategy_faults(changed, strategy)
