"""Experiment trackers, all through accelerate's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from peftune.errors import ConfigError, Fault, MachineError

PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboard"}
"""Trackers whose package has another name than they."""
PROJECT = "peftune"
"""What the runs of trackers that gather several are filed under; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME change it."""
MENDS = {"wandb": "wandb login, or WANDB_MODE=offline", "mlflow": "see to MLFLOW_TRACKING_URI"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise unless every tracker is known and its package installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(Fault(kind="config", message=f"log.trackers: {name!r} is unknown",
                                    mend=f"use {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"))
        if importlib.util.find_spec(name) is None:
            raise MachineError(Fault(kind="environment", message=f"log.trackers: the package of {name} is missing",
                                     mend=f"pip install {PACKAGES.get(name, name)}, or log.trackers=[]"))


def start_trackers(names: tuple[str, ...], run_folder: Path, settings: Mapping[str, Any]) -> list[GeneralTracker]:
    """Start the trackers of a run, on the main process, and tell them the run's settings.

    Raises:
        MachineError: a tracker cannot begin: nobody is logged in, or its server cannot be reached.
    """
    return [_started(name, run_folder, settings) for name in names]


def _started(name: str, run_folder: Path, settings: Mapping[str, Any]) -> GeneralTracker:
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    match name:
        case "tensorboard":
            tracker = tracker_class("tensorboard", str(run_folder))
        case "wandb":
            tracker = tracker_class(os.environ.get("WANDB_PROJECT", PROJECT), name=run_folder.name, dir=str(run_folder))
        case "mlflow":
            tracker = tracker_class(PROJECT, run_name=run_folder.name)
        case "trackio":
            tracker = tracker_class(PROJECT, name=run_folder.name)
        case _:
            folder = [str(run_folder)] if tracker_class.requires_logging_directory else []
            tracker = tracker_class(run_folder.name, *folder)
    try:
        tracker.start()
        if name != "tensorboard":  # it would make a run of its own of them; config.yaml lies beside it
            tracker.store_init_configuration(dict(_flat(settings)))
    except Exception as error:  # each library raises what it likes, and the mend is the same
        raise MachineError(Fault(kind="environment", message=f"log.trackers: {name} cannot begin: {error}",
                                 mend=f"{MENDS.get(name, 'see what it says')}, or leave it out of log.trackers")
                           ) from error
    return tracker


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted keys; lists as text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str | int | float | None) else str(value)
