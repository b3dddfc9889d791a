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


OTHER_DIVISIONS = ("cp_size", "sp_size", "tp_size", "dp_replicate_size")
"""Keys of accelerate's parallelism_config that no strategy here follows."""
LONG_SEQUENCES = ("a sequence stays on one device: model.gradient_checkpointing=true, a smaller data.max_length, or "
                  "--strategy fsdp2 or zero3-offload make room for longer ones")


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
    for key in OTHER_DIVISIONS if _on("ACCELERATE_USE_PARALLELISM_CONFIG") else ():
        size = os.environ.get(f"PARALLELISM_CONFIG_{key.upper()}", "1")
        if size != "1":
            raise MachineError(Fault(
                kind="environment", message=f"parallelism_config_{key}: {size}: weights and examples are divided among "
                "all ranks, sequences and layers never", mend=f"leave it out or write 1; {LONG_SEQUENCES}"))


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")
