"""Host arrays -> tensors on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array's values on a device. On a GPU the copy takes its turn among the work queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":  # from other memory, the copy would wait for all that the GPU is still to do
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where N sequences that lie end to end begin and end, as kernels for such rows take it: int32 [N + 1]."""
    return to_device(np.asarray([0, *accumulate(lengths)], np.int32), device)
