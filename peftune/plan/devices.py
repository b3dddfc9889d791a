"""Devices by name: what torch can have of their memory, and how fast they multiply, as their makers state it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from peftune.errors import ConfigError, Fault
from peftune.model.precision import DTYPES, choose_products
from peftune.parallel.host_memory import MOST_SLACK, USUAL_SLACK, allocator, limit_bytes, preload, unused_bytes

GIB = 2**30
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a kind."""

    name: str
    memory_bytes: int
    """What torch reports as its total."""
    flops: Mapping[str, float]
    """Dense products a second, by dtype; float32 without TF32, since torch leaves that off."""
    framework_bytes: int
    """What the process needs there beside tensors: a GPU's context and libraries' workspaces."""
    slack: float
    """Share of what comes and goes in a step that the allocator holds on top of it."""
    reached: float
    """Share of `flops` that training is taken to reach."""
    most_slack: float = 0.0
    """What `auto` settings leave for the allocator instead of `slack`, if that is more."""

    @property
    def on_cpu(self) -> bool:
        """Tensors lie in host memory."""
        return self.name == "cpu"


GPU_FRAMEWORK_BYTES = int(0.75 * GIB)
"""CUDA context, cuBLAS and NCCL workspaces: an assumption, not measured by us."""
GPU_SLACK = 0.06
"""Of torch's caching allocator, over activations, gradients and temporaries: an assumption, not measured by us."""
GPU_REACHED = 0.4
"""Share of the stated rate: an assumption, not measured by us."""
CPU_FRAMEWORK_BYTES = 600 * 2**20
CPU_REACHED = 0.5


def _gpu(name: str, memory_gib: float, bfloat16: float, float32: float) -> Device:
    return Device(name, int(memory_gib * GIB), {"bfloat16": bfloat16 * TERA, "float32": float32 * TERA},
                  GPU_FRAMEWORK_BYTES, GPU_SLACK, GPU_REACHED)


GPUS: Mapping[str, Device] = {device.name: device for device in (
    _gpu("b200-180gb", 178.0, 2250, 75), _gpu("h200-141gb", 139.8, 989, 67), _gpu("h100-80gb", 79.1, 989, 67),
    _gpu("a100-80gb", 79.1, 312, 19.5), _gpu("a100-40gb", 39.4, 312, 19.5), _gpu("l40s-48gb", 44.4, 362, 91.6),
    _gpu("l4-24gb", 22.0, 121, 30.3), _gpu("a10g-24gb", 22.0, 70, 35), _gpu("rtx-4090-24gb", 23.5, 165, 82.6),
)}
"""bfloat16 and float32 in 10¹² operations a second, dense, from NVIDIA's data sheets."""
NAMES = (*GPUS, "cpu")


def device_named(name: str, dtype: str, devices: int) -> Device:
    """A GPU of the table, or this machine's processor, timed for a moment, with the memory that each of so many
    processes on it may take.

    Raises:
        ConfigError: no such device.
    """
    if name == "cpu":
        kind = "tcmalloc" if preload() else allocator()  # as `peftune train` would start it
        return Device("cpu", _host_bytes(devices), {dtype: cpu_rate(dtype)}, CPU_FRAMEWORK_BYTES, USUAL_SLACK[kind],
                      CPU_REACHED, MOST_SLACK[kind])
    if name not in GPUS:
        raise ConfigError(Fault(kind="config", message=f"--device {name}: not in the table",
                                mend=f"one of {', '.join(NAMES)}"))
    return GPUS[name]


def _host_bytes(processes: int) -> int:
    """Of this machine's memory, for each process; a plan's causes are all that PEFTUNE_MEMORY_BYTES bounds."""
    unused, limit = unused_bytes(processes), limit_bytes()
    return unused if limit is None else min(unused, limit)


def device_here(dtype: str, devices: int) -> Device:
    """This machine's GPU, as it is in the table or by its memory alone; else its processor."""
    if not torch.cuda.is_available():
        return device_named("cpu", dtype, devices)
    here = torch.cuda.get_device_properties(0)
    near = min(GPUS.values(), key=lambda device: abs(device.memory_bytes - here.total_memory))
    return replace(near, name=f"{here.name} (timed as {near.name})", memory_bytes=here.total_memory)


def cpu_rate(dtype: str) -> float:
    """Operations a second of a product of two matrices of 1024 x 1024 values, the faster of three."""
    left = torch.ones(1024, 1024, dtype=DTYPES[dtype])
    choose_products(dtype, left.device)  # as a run does
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(left, left)
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)
