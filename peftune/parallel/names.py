"""Names that the launcher and the launched process share, and what accelerate's environment says. Imports no torch."""

from __future__ import annotations

import os
from typing import Literal

from peftune.errors import Fault, MachineError

ASKED = "PEFTUNE_PROCESSES"
"""Environment variable in which `peftune train` hands down the number of processes it asked for."""
ASKED_STRATEGY = "PEFTUNE_STRATEGY"
"""The same for the strategy."""

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2")
"""Ways to use several devices: the presets of launch/accelerate."""
BY_MODULE = frozenset({"zero3", "zero3-offload"})
"""Those that gather a weight for the call of the very module that holds it; fsdp2 gathers whole transformer layers."""


OTHER_DIVISIONS = ("cp_size", "tp_size", "dp_replicate_size")
"""Keys of accelerate's parallelism_config that no strategy here follows."""
DIVIDE_SEQUENCES = "--sequence-parallel N, or parallelism_config_sp_size: N in accelerate's parallelism_config"
"""How several devices are told to share each sequence."""
SEQUENCES, SEQUENCES_ON = "PARALLELISM_CONFIG_SP_SIZE", "ACCELERATE_USE_PARALLELISM_CONFIG"
"""Environment variables in which accelerate hands that down."""


def processes_here() -> int:
    """How many of the run's processes share this machine, as the launcher says; one without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def preset_of(strategy: str) -> str:
    """The preset that starts what ran: a DeepSpeed file of one's own may offload where no preset does."""
    return strategy if strategy in STRATEGIES else strategy.removesuffix("-offload")


def processes_words(processes: int, sequence_ranks: int) -> list[str]:
    """The options of `peftune train` for so many processes, so many of which share each sequence."""
    if processes == 1:
        return []
    shared = ["--sequence-parallel", str(sequence_ranks)] if sequence_ranks > 1 else []
    return ["--processes", str(processes), *shared]


def launched_kind() -> Literal["zero", "fsdp2", "plain"]:
    """What `accelerate launch` was told by its config or flags."""
    if _on("ACCELERATE_USE_DEEPSPEED"):
        return "zero"
    return "fsdp2" if _on("ACCELERATE_USE_FSDP") else "plain"


def check_launched(name: str) -> None:
    """Raise MachineError unless the strategy that runs is all that `peftune train` or accelerate's config asked for."""
    asked = os.environ.get(ASKED_STRATEGY, name)
    if asked != name:
        raise MachineError(Fault(kind="environment", message=f"{asked} was asked for, and {name} was started",
                                 mend="look at the accelerate launch line above"))
    for key in OTHER_DIVISIONS if _on(SEQUENCES_ON) else ():
        size = os.environ.get(f"PARALLELISM_CONFIG_{key.upper()}", "1")
        if size != "1":
            raise MachineError(Fault(
                kind="environment", message=f"parallelism_config_{key}: {size}: weights and examples are divided among "
                "all ranks, layers never", mend=f"leave it out or write 1; for long sequences {DIVIDE_SEQUENCES}"))


def sequence_ranks() -> int:
    """How many neighbouring ranks are to share each sequence; 1 where none is divided.

    Raises:
        MachineError: accelerate's setting is no number of ranks.
    """
    given = os.environ.get(SEQUENCES, "1") if _on(SEQUENCES_ON) else "1"
    if not given.isdecimal() or int(given) < 1:
        raise MachineError(Fault(kind="environment", message=f"{SEQUENCES}={given}: a number of ranks is 1 or more",
                                 mend=DIVIDE_SEQUENCES))
    return int(given)


def refuse_divided_sequences() -> None:
    """Raise MachineError where a command that runs each sequence whole is told to divide it."""
    if sequence_ranks() > 1:
        raise MachineError(Fault(kind="environment", message="only training divides sequences, this command does not",
                                 mend=f"leave parallelism_config_sp_size ({SEQUENCES}) out"))


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")
