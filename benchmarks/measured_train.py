"""What a rank holds and exchanges as it trains: accelerate launch benchmarks/measured_train.py CONFIG.yaml [key=value]

The run is peftune/train.py's up to the last step's checkpoint: `build`, then `fit`. `memory-<rank>.json` in the run
folder then says, in bytes,

- the highest resident memory of the process in each phase: before the first step (imports, reading the data, loading
  and placing the model), in each step, and while the checkpoint is written. Linux's VmHWM is set back (by "5" in
  /proc/self/clear_refs) where a phase begins; glibc gives back the memory that it holds free before that.
- how resident memory divides after the last step: anonymous, mapped from files (libraries, and weights that nothing
  has written to, if they lie in the mapped checkpoint), and shared. Plus the memory before anything was loaded.
- for each step and kind of collective, the tensors that this rank hands in: for all-reduce and broadcast the tensor,
  for reduce-scatter the whole input, for all-gather this rank's part only. All calls that reach torch.distributed's
  process groups in the thread that trains are seen, from Python and from C++, since torch's dispatcher passes them on.
  What a backend sends over the wire for them is its own affair, and not counted.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftune.loop.fit as loop
from peftune.build import build
from peftune.config.load import load
from peftune.errors import EXIT_DONE, guarded

KINDS = {
    "allreduce_": "all-reduce", "allreduce_coalesced_": "all-reduce", "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce", "all_reduce_coalesced": "all-reduce",
    "allgather_": "all-gather", "_allgather_base_": "all-gather", "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather", "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall_base_": "all-to-all", "broadcast_": "broadcast", "broadcast": "broadcast", "reduce_": "reduce",
}
"""Operators of torch.distributed and what they are; others keep their names."""
NO_EXCHANGE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class Exchanged(TorchDispatchMode):
    """Counts what is handed to collectives; results stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: Counter[str] = Counter()
        """Bytes, by kind."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # the operators that it is made of come here next
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in NO_EXCHANGE:
            names = [argument.name for argument in func._schema.arguments]
            given = next((i for i, name in enumerate(names) if name.startswith("input")), 0)
            self.handed[KINDS.get(name, name)] += _bytes(args[given])
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def new_phase(*, trimmed: bool = True) -> int:
    """The highest resident memory since the last call, in bytes; from here on it counts anew.

    `trimmed`: glibc gives back what it holds free, so that a phase does not count what another one left.
    """
    peak = resident("VmHWM")
    if trimmed:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak


def main(arguments: list[str]) -> int:
    """Train, and write what was measured."""
    config = load(arguments)
    imported, steps, exchanged, plain_step = resident("VmRSS"), [], [], loop.train_step
    peaks: dict[str, Any] = {}

    def measured_step(*given: Any, **named: Any) -> Any:
        before = new_phase()
        peaks.setdefault("before_steps", before)
        with Exchanged() as seen:
            stats = plain_step(*given, **named)
        peaks["held_after_steps"] = {key: resident(key) for key in ("RssAnon", "RssFile", "RssShmem")}
        steps.append(new_phase())
        exchanged.append(dict(seen.handed))
        return stats

    loop.train_step = measured_step
    with build(config) as built:
        assert built.run is not None, "a measured run starts in an empty folder"
        loop.fit(built.run, built.state)
        peaks["checkpoint"] = new_phase()
        run = built.run
        (run.folder / f"memory-{run.strategy.world.rank}.json").write_text(json.dumps({
            "strategy": run.strategy.name, "trainable": run.facts["trainable_parameters"],
            "total": run.facts["total_parameters"], "threads": torch.get_num_threads(), "imported_bytes": imported,
            "peak_bytes": peaks | {"steps": steps}, "handed_bytes": exchanged}), encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
