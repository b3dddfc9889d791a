"""Which bytes are alive: every tensor's storage, from the operator that makes it until nothing holds it.

The same watch counts real tensors and tensors without values (`model/hollow.py`), so that what is predicted is compared
with what is measured by one rule. It does not see what a kernel takes for itself while it computes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from peftune.model.hollow_tensor import storage_of

FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

START = "start"
"""The label of instants until another is set."""


@dataclass(slots=True)
class Storage:
    """A piece of memory, and why it is there. The cause may become known later than the peak."""

    size_bytes: int
    cause: str


@dataclass(slots=True)
class Peak:
    """The highest sum of live bytes while a label was set, and what was alive then."""

    live_bytes: int = 0
    alive: tuple[Storage, ...] = ()

    def by_cause(self) -> Counter[str]:
        """Bytes by cause."""
        causes: Counter[str] = Counter()
        for storage in self.alive:
            causes[storage.cause] += storage.size_bytes
        return causes


class LiveBytes(TorchDispatchMode):
    """While entered, follows what operators allocate; a `Peak` for each label that is set meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.cause, self.label = "other", START
        """Of what is allocated from now on; of the instants from now on."""
        self.peaks: dict[str, Peak] = {}
        self.flops = 0
        """Floating-point operations of matrix products and attention so far (torch's own formulas)."""
        self.live_bytes = 0
        self._storages: dict[int, Storage] = {}

    def hold(self, tensors: Iterable[Tensor], cause: str) -> None:
        """Count tensors that lie there already; say the cause of what is counted."""
        for tensor in tensors:
            self._follow(tensor, cause)
            self._storages[_key(tensor)].cause = cause

    def held(self) -> Counter[str]:
        """Bytes that are alive now, by cause."""
        return Peak(self.live_bytes, tuple(self._storages.values())).by_cause()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # the operators that it is made of come here next
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_positions(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._follow(value, self.cause)
        self._count(func, args, kwargs or {}, result)
        peak = self.peaks.setdefault(self.label, Peak())
        if self.live_bytes > peak.live_bytes:
            peak.live_bytes, peak.alive = self.live_bytes, tuple(self._storages.values())
        return result

    def _follow(self, tensor: Tensor, cause: str) -> None:
        key = _key(tensor)
        if key not in self._storages:
            held = storage_of(tensor)
            self._storages[key] = Storage(held.nbytes(), cause)
            self.live_bytes += held.nbytes()
            weakref.finalize(held, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._storages.pop(key).size_bytes

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        packet = func.overloadpacket
        if packet is FLASH_ON_CPU:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is FLASH_ON_CPU_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)


def _key(tensor: Tensor) -> int:
    return storage_of(tensor)._cdata


def _as_positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as the positions that they select: a tensor without values cannot be asked how many those are."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
