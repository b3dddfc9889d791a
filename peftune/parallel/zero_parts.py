"""Where a rank's part of a weight lies under ZeRO, and which weights a gradient has reached."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's part of one weight inside the flat tensor that the optimizer works on."""

    flat: Tensor
    offset: int
    size: int
    begin: int
    """Of the part, in the flattened whole weight."""
    shape: tuple[int, ...]
    """Of the whole weight."""

    def of(self, flat: Tensor) -> Tensor:
        """The part inside `flat`, or inside a tensor of the optimizer's state with the same layout."""
        return flat.narrow(0, self.offset, self.size)

    def of_whole(self, values: Tensor, *, divided: bool) -> Tensor:
        """The part out of the flattened weight, or out of this rank's partition of it."""
        return values.narrow(0, 0 if divided else self.begin, self.size)


@dataclass(frozen=True, slots=True)
class Reached:
    """Notes that a gradient has reached a weight, whatever the engine does with it next."""

    seen: set[int]
    parameter: int

    def __call__(self, gradient: Tensor) -> None:
        self.seen.add(self.parameter)
