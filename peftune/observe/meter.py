"""How much memory this process has used at most."""

from __future__ import annotations

import resource
import sys

import torch


def forget_peak(device: torch.device) -> None:
    """Count a GPU's peak from here on; a process's resident memory keeps its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of allocated GPU memory since `forget_peak`, or of this process's resident memory on the CPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
