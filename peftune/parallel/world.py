"""The processes of a run: how many, which one this is, and that they are as many as were asked for."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from peftune.containers import cores
from peftune.errors import Fault, MachineError, PeftuneError
from peftune.numerics.few_shapes import keep_few_products
from peftune.parallel.names import ASKED, processes_here
from peftune.parallel.progress import Progress

T = TypeVar("T")

EXCHANGE_LIMIT = datetime.timedelta(hours=6)
"""After which torch gives up an exchange, where nothing else has (`hang_timeout`): ranks wait as long for one that
prepares data."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others."""

    rank: int
    ranks: int
    local_rank: int
    device: torch.device
    backend: str | None
    progress: Progress = field(default_factory=Progress, compare=False)
    """Of this process, for those that watch it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.ranks > 1:
            with self.progress.exchange():
                dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, on each of them and where the tensor lies: NCCL takes only what is on the
        device, and offloaded weights are not."""
        if self.ranks == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        with self.progress.exchange():
            dist.all_reduce(total)
            if total.is_cuda:  # else whoever reads the sum waits for it, and is not seen to wait for the others
                torch.cuda.current_stream(total.device).synchronize()
        return total.to(tensor.device)

    def any(self, mine: bool) -> bool:
        """Whether it is so on at least one process."""
        return mine if self.ranks == 1 else self.sum(torch.tensor(float(mine), device=self.device)).item() > 0

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return max(self.gather([number]))

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the main process's, on each process."""
        if self.ranks > 1:
            with self.progress.exchange():
                dist.broadcast(tensor, src=0)

    def gather(self, objects: Sequence[T]) -> list[T]:
        """The objects of all processes in rank order, on each of them. For small things: records, names."""
        if self.ranks == 1:
            return list(objects)
        parts: list[Any] = [None] * self.ranks
        with self.progress.exchange():
            dist.all_gather_object(parts, list(objects))
        return [item for part in parts for item in part]

    def same(self, value: T) -> T:
        """The main process's value, on each process."""
        if self.ranks == 1:
            return value
        box = [value]
        with self.progress.exchange():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on the main process only and give all processes its result.

        A fault that the user can mend is raised on every process, so that none waits for one that is gone.
        """
        if self.ranks == 1:
            return work()
        result: Any = None
        fault: PeftuneError | None = None
        if self.is_main:
            try:
                with self.progress.alone():
                    result = work()
            except PeftuneError as error:
                fault = error
        result, fault = self.same((result, fault))
        if fault is not None:
            raise fault
        return result

    def on_each_machine(self, work: Callable[[], T]) -> T:
        """Run `work` on one process of each machine and give its result to the others there.

        A fault that the user can mend is raised on every process of every machine.
        """
        if self.ranks == 1:
            return work()
        result: Any = None
        fault: PeftuneError | None = None
        if self.local_rank == 0:
            try:
                with self.progress.alone():
                    result = work()
            except PeftuneError as error:
                fault = error
        outcomes = self.gather([(result, fault)])
        for _, fault in outcomes:
            if fault is not None:
                raise fault
        return outcomes[self.rank - self.local_rank][0]  # launchers number the processes of a machine in a row


@contextlib.contextmanager
def opened_world() -> Iterator[World]:
    """The process group that the launcher's environment describes, until the block ends.

    An error of one of several processes leaves the group as it is: NCCL ends one only together with the others, which
    may be waiting in an exchange, while a process that fails ends without (`errors.guarded`).

    Raises:
        MachineError: see `_open_world`.
    """
    world = _open_world()
    try:
        yield world
    except BaseException:
        if world.ranks == 1:
            _close_world()
        raise
    _close_world()


def _open_world() -> World:
    """Start the process group that the launcher's environment describes.

    Raises:
        MachineError: fewer or more processes run together than were asked for. Some launch lines start one
            plain process, or processes that do not know of each other, and look as if they had worked.
    """
    asked = int(os.environ.get(ASKED) or os.environ.get("WORLD_SIZE") or 1)
    if "WORLD_SIZE" not in os.environ and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise _wrong_world("accelerate launch was asked for several processes and started one plain process")
    use_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if not use_cpu:
        _suit_changing_shapes()
    _join_after_restart(use_cpu)
    state = PartialState(cpu=use_cpu, timeout=EXCHANGE_LIMIT)
    if state.num_processes != asked:
        raise _wrong_world(f"{asked} processes were asked for, {state.num_processes} run together")
    _share_cores(processes_here())
    if use_cpu:
        keep_few_products()
    return World(state.process_index, state.num_processes, state.local_process_index, state.device, state.backend)


def _suit_changing_shapes() -> None:
    """Micro-batches seldom have a shape twice: blocks of GPU memory that can grow fit the next one too, and cuDNN's
    attention, which torch takes first on Hopper, would build a plan for each."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read at the first allocation
    torch.backends.cuda.enable_cudnn_sdp(False)


def _join_after_restart(use_cpu: bool) -> None:
    """Processes that torchrun has started again (`--max_restarts`) must not meet those that are gone.

    The launcher's store outlives them (torch 2.13, static rendezvous), and with it the addresses under which they met:
    joined the usual way, new processes try to reach old ones. So they meet under names of their own. Delete this when
    torch makes a new store for each start.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks, is_master=False)
        dist.init_process_group("gloo" if use_cpu else None, rank=rank, world_size=ranks,
                                timeout=EXCHANGE_LIMIT, store=dist.PrefixStore(f"restart-{restart}", store))


def _share_cores(processes: int) -> None:
    """Give each process on this machine its part of the cores.

    accelerate and torchrun set one thread a process unless they are told otherwise, which halves the speed of a
    CPU run on two cores; on GPUs too, the optimizer of offloaded weights computes there. torch itself would take all of
    a machine's cores where a container may use some. Any other number is somebody's wish and stays.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cores() // processes))
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def _wrong_world(message: str) -> MachineError:
    return MachineError(Fault(
        kind="environment", message=message,
        mend="accelerate launch --config_file launch/accelerate/ddp-cpu.yaml (ddp.yaml on GPUs) --num_processes N ..., "
        "or peftune train CONFIG --strategy ddp --processes N",
    ))


def _close_world() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()
