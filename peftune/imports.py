"""Imports of large libraries, for processes that are ours from start to end."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_search_for_garbage() -> Iterator[None]:
    """Import without searching for garbage, and leave what is there then out of all later searches.

    Libraries make millions of objects that stay. Python would look through them again and again while they come, and
    once more when the process ends: together a third of what a command waits for them (`peftune bench startup`).
    """
    was_on, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:  # else there may be garbage, and nothing that pays for keeping it
            gc.freeze()
        if was_on:
            gc.enable()
