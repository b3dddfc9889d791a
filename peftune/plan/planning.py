"""What `peftune plan` prints, from its words to its text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from peftune.config.load import load
from peftune.config.rules import refuse_broken
from peftune.errors import EXIT_DOES_NOT_FIT, EXIT_DONE, ConfigError, Fault
from peftune.parallel.launcher import strategy_for
from peftune.plan.answer import Answer, Case, Planner
from peftune.plan.devices import device_here, device_named
from peftune.plan.divide import Division
from peftune.plan.mends import Mend, mends
from peftune.plan.show import as_json, rendered
from peftune.tasks.text import quiet_libraries


def planned(
    words: Sequence[str], device: str | None, devices: int, strategy: str | None, sharing: int = 1, *,
    json_wanted: bool,
) -> tuple[str, int]:
    """What the command prints, and its exit code. Arguments as for `answered`, and

    Args:
        json_wanted: one JSON object instead of a table.
    """
    found, ways, note = answered(words, device, devices, strategy, sharing)
    text = json.dumps(as_json(found, ways, note)) if json_wanted else rendered(found, ways, note)
    return text, EXIT_DONE if found.fits else EXIT_DOES_NOT_FIT


def answered(
    words: Sequence[str], device: str | None, devices: int, strategy: str | None, sharing: int = 1,
) -> tuple[Answer, list[Mend], str]:
    """The plan, the changes that make it fit if it does not, and where the lengths come from.

    Args:
        words: the config's file, and key=value after it.
        device: a name of the table; None for what this machine has.
        devices: how many.
        strategy: None for single, or ddp on several devices.
        sharing: devices that share each sequence.

    Raises:
        PeftuneError: whatever the user can mend.
    """
    config = load(list(words))
    if devices < 1:
        raise ConfigError(Fault(kind="config", message=f"--devices {devices}: a run takes one or more",
                                mend="--devices 1, or leave it out"))
    if sharing < 1 or devices % sharing:
        raise ConfigError(Fault(kind="config", message=f"{devices} devices form no groups of {sharing}",
                                mend="--devices that --sequence-parallel divides"))
    strategy = strategy_for(strategy or "auto", devices)
    refuse_broken(config, strategy, sharing)
    quiet_libraries()
    kind = config.model.dtype
    case = Case(config, device_here(kind, devices) if device is None else device_named(device, kind, devices),
                Division(strategy, devices, sharing))
    planner = Planner(config)
    found = planner.answer(case)
    ways = [] if found.fits else mends(case, planner)
    return found, ways, planner.known.note
