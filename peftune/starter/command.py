"""`peftune init`: look at the data, write a config, say what was understood."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from peftune.errors import (
    EXIT_DONE,
    ConfigError,
    DataError,
    Fault,
    PeftuneError,
    RunFolderError,
    refuse_odd_name,
    writing_to,
)
from peftune.imports import without_search_for_garbage
from peftune.numerics.counted import counted

if TYPE_CHECKING:
    from peftune.starter.guess import Guess

LOOKED_AT = 1000
"""Rows of the data."""
SEPARATORS_IN = 20
"""Lines of a table in which its separator is looked for."""
PLACEHOLDER = "train.jsonl"
"""Data of a config for a task alone."""


def add_init(commands: Any) -> None:
    """Add `peftune init` with its options to the commands."""
    text = "a first config for your data: task and columns are found"
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument("data", metavar="DATA", nargs="?",
                      help="your rows: a file, glob or folder; a hub id, with --task; or only the name of a task")
    init.add_argument("--to", metavar="CONFIG.yaml", help="default: named after the data; never written over")
    init.add_argument("--task", help="default: found from the columns")
    init.add_argument("--columns", nargs="+", default=[], metavar="EXPECTED=GIVEN",
                      help="which column is which, as text=Message label=Team; default: found")
    init.add_argument("--model", help="a hub id, a folder, or package:<import name>/<folder>; default: a small one")
    init.add_argument("--validation", default="0.1", help="a share to split off, or a file; default 0.1")
    init.add_argument("--test", help="a file that is scored at the end")
    for name in ("llamafactory", "axolotl"):
        init.add_argument(f"--from-{name}", metavar="FILE", help="a config of it, in place of DATA")
    init.add_argument("--devices", type=int, default=1, metavar="N",
                      help="--from-...: those that its batch size was meant for; default 1")
    init.set_defaults(command=_init, takes_overrides=False)


def _init(parsed: argparse.Namespace) -> int:
    from peftune.config.rules import FORMATS
    from peftune.starter.guess import Guess
    from peftune.starter.starting import on_a_line, starting_config

    _refuse_odd_names(vars(parsed))
    others = {name: file for name, file in vars(parsed).items() if name.startswith("from_") and file}
    if len(others) + (parsed.data is not None) != 1:
        raise ConfigError(Fault(kind="config", message="one thing to begin with is needed",
                                mend="peftune init DATA, --from-llamafactory FILE or --from-axolotl FILE"))
    if others:
        [(dialect, file)] = others.items()
        return _from_other(dialect.removeprefix("from_"), file, parsed.to or f"{Path(file).stem}-peftune.yaml",
                           parsed.devices)
    name = parsed.to or f"{_stem(parsed.data)}.yaml"
    _refuse_existing(name)
    if parsed.data in FORMATS and not Path(parsed.data).exists():
        rows, found = PLACEHOLDER, Guess(parsed.data, "auto", _pairs(parsed.columns))
    else:
        rows, found = parsed.data, _look(parsed.data, parsed.task, _pairs(parsed.columns))
    _write(name, starting_config(
        name, found, about=f"Made by `peftune init {parsed.data}`.", output_dir=f"runs/{Path(name).stem}",
        model=parsed.model, data={"train": rows, "validation": _number(parsed.validation), "test": parsed.test}))
    columns = "".join(f", {expected} from the column {given}" for expected, given in found.columns.items())
    classes = f", {counted(len(found.classes), 'class')}" if found.classes else ""
    classes += f", {found.problem}" if found.problem != "auto" else ""
    notes = "".join(f"{on_a_line(note)}\n" for note in found.notes)
    word = shlex.quote(name)
    print(f"{name}: {found.task}{columns}{classes}\n{notes}next: peftune check {word}, then peftune train {word}")
    return EXIT_DONE


def _refuse_odd_names(options: Mapping[str, Any]) -> None:
    for option, given in options.items():
        for word in given if isinstance(given, list) else [given]:
            if isinstance(word, str) and option != "data":  # that is looked at where rows are read
                refuse_odd_name(word, f"--{option.replace('_', '-')}")


def _stem(data: str) -> str:
    """What to call a config: the file, or the folder of a glob, or the data set."""
    plain = [part for part in Path(data.partition(":")[0]).parts if not set(part) & set("*?[")]
    return Path(plain[-1]).stem if plain and Path(plain[-1]).stem else "config"


def _from_other(dialect: str, file: str, name: str, devices: int) -> int:
    from peftune.starter.foreign import DIALECTS, translate
    from peftune.starter.starting import nested_yaml, on_a_line

    _refuse_existing(name)
    if devices < 1:
        raise ConfigError(Fault(kind="config", message=f"--devices {devices}", mend="use 1 or more"))
    found = translate(file, DIALECTS[dialect], devices)
    left = [f"not taken over: {key}: {shorten(str(value), 80)}  ({why})" for key, value, why in found.left]
    _write(name, "".join(f"# {on_a_line(line)}\n" for line in [
        f"Made by `peftune init --from-{dialect} {file}`, for {counted(devices, 'device')}.", *left,
    ]) + nested_yaml(found.ours))
    print("\n".join([*left, f"{name}: {counted(len(found.ours), 'setting')}\nnext: peftune check {shlex.quote(name)}"]))
    return EXIT_DONE


def _look(data: str, task: str | None, columns: dict[str, str]) -> Guess:
    with without_search_for_garbage():
        from peftune.config.rules import FORMATS
        from peftune.config.schema import Source
        from peftune.data.rows import Faults
        from peftune.data.sources import files_of, read, refuse_odd_file
        from peftune.starter.guess import Guess, guess

    if task is not None and task not in FORMATS:
        raise ConfigError(Fault(kind="config", message=f"--task {task} is unknown", mend=f"use {', '.join(FORMATS)}"))
    refuse_odd_file(data)
    source, faults = Source(path=data), Faults()
    files = files_of(source)
    if not files:
        if task is None:
            raise ConfigError(Fault(kind="config", message=f"{data} is no file here; on the hub nothing is looked at",
                                    mend=f"check the path, or say what is learned: --task {' | '.join(FORMATS)}"))
        return Guess(task, "auto", columns)
    _refuse_other_separators(files)
    rows = [row.values for row in islice(read(source, faults), LOOKED_AT)]
    if not rows:
        raise ConfigError(faults.kept)
    return guess(data, rows, task, columns)


def _refuse_other_separators(files: Iterable[Path]) -> None:
    """Refuse a table whose header, and a line below it, hold another separator and never the one that is read."""
    for file in files:
        read = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
        if read is None:
            continue
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            header, *below = [line for line in islice(stream, SEPARATORS_IN) if line.strip()] or [""]
        for other in ";\t|,":
            if read not in header and other in header and any(other in line for line in below):
                raise DataError(Fault(
                    kind="data", file=str(file), message=f"the separator seems to be {other!r}, and {read!r} is read",
                    mend="save it with commas as .csv, or with tabs as .tsv"))


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

    with writing_to(name, "--to"):
        Path(name).write_text(text, encoding="utf-8")
    try:
        load([name])
    except PeftuneError as error:
        Path(name).unlink()
        raise ConfigError([replace(fault, file=None, line=None) for fault in error.faults]) from None
