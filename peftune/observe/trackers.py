"""Experiment trackers, all through accelerate's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from peftune.errors import ConfigError, Fault, MachineError

PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboard"}
"""Trackers whose package has another name than they."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise unless every tracker is known and its package installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(Fault(kind="config", message=f"log.trackers: {name!r} is unknown",
                                    mend=f"use {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"))
        if importlib.util.find_spec(name) is None:
            raise MachineError(Fault(kind="environment", message=f"log.trackers: the package of {name} is missing",
                                     mend=f"pip install {PACKAGES.get(name, name)}, or log.trackers=[]"))


def start_trackers(names: tuple[str, ...], run_folder: Path) -> list[GeneralTracker]:
    """Start the trackers of a run, on the main process; local ones write below the run folder."""
    started = []
    for name in names:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        arguments = [str(run_folder)] if tracker_class.requires_logging_directory else []
        run_name = "tensorboard" if name == "tensorboard" else run_folder.name
        tracker = tracker_class(run_name, *arguments)
        tracker.start()
        started.append(tracker)
    return started
