"""A run and the machines it is to have, checked before anything is written or sent."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftune.config.load import load
from peftune.config.rules import refuse_broken
from peftune.config.schema import RunConfig
from peftune.errors import Fault, MachineError
from peftune.parallel.launcher import strategy_for

NCCL_GIVES_UP_S = 600
"""Where no `hang_timeout` does so before, in seconds."""
LONGEST_NAME = 40
"""Letters of a job's name: with what Kubernetes adds it is a part of the names of hosts, which have 63 at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, and how many processes on how many machines."""

    config: RunConfig
    arguments: tuple[str, ...]
    """CONFIG and key=value, as they were given."""
    name: str
    """Of lower-case letters, digits and hyphens, at most LONGEST_NAME of them."""
    nodes: int
    gpus_per_node: int
    """0: one process on the CPUs of each."""
    strategy: str

    @property
    def processes(self) -> int:
        """Of all machines together."""
        return self.nodes * max(1, self.gpus_per_node)

    @property
    def others_s(self) -> int:
        """How long other machines may go on after one has ended, in seconds. Under NCCL their watchdogs end them after
        `hang_timeout`, and then say whom they miss."""
        return (self.config.hang_timeout_s or NCCL_GIVES_UP_S) + 300

    def train_words(self, arguments: Sequence[str], *, rank: str, main: str) -> list[str]:
        """What the launcher of one machine gets behind `python -m peftune`.

        Args:
            arguments: CONFIG and key=value, as that machine sees them.
            rank: the machine's number, from 0.
            main: HOST:PORT of the first machine.
        """
        return ["train", *arguments, "--strategy", self.strategy, "--processes", str(self.processes),
                "--nodes", str(self.nodes), "--node-rank", rank, "--main-node", main]


def check_job(arguments: Sequence[str], *, name: str | None, nodes: int, gpus_per_node: int, strategy: str) -> Job:
    """Load the config and put the job together.

    Raises:
        ConfigError: the config is wrong, or cannot train by this strategy.
        MachineError: no such number of machines or processes for it.
    """
    for option, number, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus_per_node, 0)):
        if number < least:
            raise MachineError(Fault(kind="environment", message=f"{option} {number}", mend=f"use {least} or more"))
    config = load(arguments)
    chosen = strategy_for(strategy, nodes * max(1, gpus_per_node))
    refuse_broken(config, chosen)
    return Job(config=config, arguments=tuple(arguments), name=_host_name(name or Path(arguments[0]).stem),
               nodes=nodes, gpus_per_node=gpus_per_node, strategy=chosen)


def _host_name(text: str) -> str:
    """The nearest name that hosts may have (RFC 1123), with room for what Kubernetes adds."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:LONGEST_NAME].strip("-") or "peftune"
