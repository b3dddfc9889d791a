"""`peftune init`: look at the data, write a config, say what was understood."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftune.errors import EXIT_DONE, ConfigError, Fault, MachineError, PeftuneError, RunFolderError

if TYPE_CHECKING:
    from peftune.starter.guess import Guess

LOOKED_AT = 1000
"""Rows of the data."""


def add_init(commands: Any) -> None:
    """Add `peftune init` with its options to the commands."""
    text = "a first config for your data: task and columns are found"
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument("data", metavar="DATA", help="your rows: a file, glob or folder; or a hub id, with --task")
    init.add_argument("--to", metavar="CONFIG.yaml", help="default: named after the data; never written over")
    init.add_argument("--task", help="default: found from the columns")
    init.add_argument("--columns", nargs="+", default=[], metavar="EXPECTED=GIVEN",
                      help="which column is which, as text=Message label=Team; default: found")
    init.add_argument("--model", help="a hub id, a folder, or package:<import name>/<folder>; default: a small one")
    init.add_argument("--validation", default="0.1", help="a share to split off, or a file; default 0.1")
    init.add_argument("--test", help="a file that is scored at the end")
    init.set_defaults(command=_init, takes_overrides=False)


def _init(parsed: argparse.Namespace) -> int:
    from peftune.starter.starting import starting_config

    name = parsed.to or f"{Path(parsed.data.rstrip('/*')).stem}.yaml"
    _refuse_existing(name)
    found = _look(parsed.data, parsed.task, _pairs(parsed.columns))
    _write(name, starting_config(
        name, found, about=f"Made by `peftune init` from {parsed.data}.", output_dir=f"runs/{Path(name).stem}",
        model=parsed.model, data={"train": parsed.data, "validation": _number(parsed.validation),
                                  "test": parsed.test}))
    columns = "".join(f", {expected} from the column {given}" for expected, given in found.columns.items())
    classes = f", {len(found.classes)} classes" if found.classes else ""
    classes += f", {found.problem}" if found.problem != "auto" else ""
    print(f"{name}: {found.task}{columns}{classes}\nnext: peftune check {name}, then peftune train {name}")
    return EXIT_DONE


def _look(data: str, task: str | None, columns: dict[str, str]) -> Guess:
    from peftune.config.rules import FORMATS
    from peftune.config.schema import Source
    from peftune.data.rows import Faults
    from peftune.data.sources import files_of, read
    from peftune.starter.guess import Guess, guess

    if task is not None and task not in FORMATS:
        raise ConfigError(Fault(kind="config", message=f"--task {task} is unknown", mend=f"use {', '.join(FORMATS)}"))
    source, faults = Source(path=data), Faults()
    if not files_of(source):
        if task is None:
            raise ConfigError(Fault(kind="config", message=f"{data} is no file here; on the hub nothing is looked at",
                                    mend=f"check the path, or say what is learned: --task {' | '.join(FORMATS)}"))
        return Guess(task, "auto", columns)
    rows = [row.values for row in islice(read(source, faults), LOOKED_AT)]
    if not rows:
        raise ConfigError(faults.kept)
    return guess(data, rows, task, columns)


def _pairs(words: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        expected, equals, given = word.partition("=")
        if not (expected and equals and given):
            raise ConfigError(Fault(kind="config", message=f"--columns {word}: not EXPECTED=GIVEN",
                                    mend="--columns text=Message label=Team"))
        pairs[expected] = given
    return pairs


def _number(word: str) -> Any:
    try:
        return float(word)
    except ValueError:
        return word


def _refuse_existing(name: str) -> None:
    if Path(name).exists():
        raise RunFolderError(Fault(kind="config", file=name, message="is there already", mend="give another --to"))


def _write(name: str, text: str) -> None:
    """Write a config that loads; leave no file where it does not."""
    from peftune.config.load import load

    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(Fault(kind="environment", file=name, mend="give another --to",
                                 message=f"cannot be written: {error.strerror}")) from None
    try:
        load([name])
    except PeftuneError:
        Path(name).unlink()
        raise
