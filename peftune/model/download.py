"""What comes from the hub, told while it comes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Tell = Callable[[str, int, int], None]
"""What is counted, how many there are by now, and how many there will be."""

MEGABYTE = 10**6


def bar_that_tells(tell: Tell) -> type[tqdm]:
    """A progress bar for the hub's client that draws nothing and tells megabytes instead, of files that have some."""

    class Telling(tqdm):
        monitor_interval = 0  # no thread that draws bars again

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> bool:
            if self.unit == "B" and (self.total or 0) >= MEGABYTE:
                tell("downloaded MB", int(self.n) // MEGABYTE, int(self.total) // MEGABYTE)
            return True

    return Telling
