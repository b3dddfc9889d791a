"""peftune: fine-tune transformer models with one loop, and prove what the run did."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["FinishedRun", "RunConfig", "configure", "fine_tune", "open_run"]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module("peftune.api"))[name]
