"""Command line -> one frozen RunConfig, or every fault of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peftune.config.document import (
    COMMAND_LINE,
    Document,
    KeyPath,
    dotted,
    joined,
    merge,
    method_of,
    parse_value,
    read,
    to_yaml,
)
from peftune.config.names import FAMILIAR, right_spelling
from peftune.config.rules import broken_rules
from peftune.config.schema import RunConfig
from peftune.errors import ConfigError, Fault


def load(arguments: Sequence[str]) -> RunConfig:
    """Read `CONFIG.yaml key=value ...` into a checked config.

    Raises:
        ConfigError: with all faults found: syntax, unknown keys, wrong values, combinations that cannot work.
    """
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            Fault(kind="config", message="no config file given", mend="peftune train CONFIG.yaml [key=value ...]")
        )
    document = merge(_with_base(Path(arguments[0]), ()), _overrides(arguments[1:]))
    return validate(document)


def validate(document: Document) -> RunConfig:
    """Values -> RunConfig. Raises ConfigError with one fault for each wrong key."""
    try:
        config = RunConfig.model_validate(document.values)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        raise ConfigError(_faults(details, document) + _adapter_faults(document)) from None
    faults = _adapter_faults(document) + broken_rules(config, document)
    if faults:
        raise ConfigError(faults)
    return config


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every default written out. Loading it gives an equal config."""
    return to_yaml(config.model_dump(mode="json"))


def _with_base(path: Path, below: tuple[Path, ...]) -> Document:
    if path.resolve() in below:
        chain = " -> ".join(str(step) for step in (*below, path.resolve()))
        raise ConfigError(Fault(kind="config", file=str(path), message=f"base leads back to itself: {chain}"))
    document = read(path)
    if "base" not in document.values:
        return document
    base = document.values.pop("base")
    place = document.places.pop(("base",), (str(path), None))  # none of its own where a YAML merge brings it
    if not isinstance(base, str):
        raise ConfigError(
            Fault(kind="config", file=place[0], line=place[1], message=f"base = {base!r}: not a path",
                  mend="base: other.yaml, relative to this file")
        )
    return merge(_with_base(path.parent / base, (*below, path.resolve())), document)


def _overrides(arguments: Sequence[str]) -> Document:
    layer = Document({})
    faults = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            faults.append(Fault(kind="config", file=COMMAND_LINE, message=f"{argument!r} is not key=value",
                                mend="write train.learning_rate=1e-4, without spaces"))
            continue
        try:
            value = parse_value(text)
        except (yaml.YAMLError, ValueError) as error:
            faults.append(Fault(kind="config", file=COMMAND_LINE, message=f"{argument}: not a YAML value: {error}",
                                mend=f"quote it for YAML, and for the shell: \"{key}='...'\""))
            continue
        if path == ("base",):
            faults.append(Fault(kind="config", file=COMMAND_LINE, message=f"{argument}: a base is inherited by a file",
                                mend=f"write base: {text} into the config, or a config that has it"))
            continue
        for part in reversed(path):
            value = {part: value}
        layer = joined(layer, Document(value, {path: (COMMAND_LINE, None)}))
    if faults:
        raise ConfigError(faults)
    return layer


def _faults(details: Sequence[ErrorDetails], document: Document) -> list[Fault]:
    """One fault a key: a union reports every member that did not fit, the reader needs one line, of the key inside."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in details:
        by_path.setdefault(_written_path(detail, document.values), []).append(detail)
    return [_fault(path, several, document) for path, several in by_path.items()
            if not any(len(inner) > len(path) and inner[:len(path)] == path for inner in by_path)]


def _written_path(detail: ErrorDetails, values: Any) -> KeyPath:
    """The error's location without the names of union members that pydantic puts into it."""
    path: list[str | int] = []
    for part in detail["loc"]:
        inside = isinstance(values, dict) and part in values
        at = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside or at:
            values = values[part]
            path.append(part)
        elif detail["type"] == "missing" and part == detail["loc"][-1]:
            path.append(part)
    return tuple(path)


def _fault(path: KeyPath, details: Sequence[ErrorDetails], document: Document) -> Fault:
    detail = details[0]
    place = document.place(path) or (None, None)
    name = dotted(path)
    if detail["type"] == "missing":
        message, mend = f"{name} is missing", f"add {name}"
    elif detail["type"] in ("extra_forbidden", "invalid_key"):
        message, mend = f"unknown key {name}", right_spelling(name)
    else:
        why, mend = _why(details)
        message = f"{name} = {_short(detail['input'])}: {why}"
    return Fault(kind="config", file=place[0], line=place[1], message=message, mend=mend)


WANTED = {"tuple_type": "a list", "tuple_from_str": "a list", "model_type": "a section of `key: value` lines",
          "model_attributes_type": "a section of `key: value` lines", "int_type": "a whole number",
          "int_parsing": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
          "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false",
          "string_type": "a text", "dict_type": "a section of `key: value` lines"}
"""What a value must be, by pydantic's name of the fault."""


def _why(details: Sequence[ErrorDetails]) -> tuple[str, str]:
    detail = details[0]
    context: dict[str, Any] = detail.get("ctx", {})
    choices = [d for d in details if d["type"] == "literal_error"]
    if choices:
        expected = " or ".join(d["ctx"]["expected"] for d in choices)
        names = [name.strip("' ") for name in expected.replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(detail["input"]), names, n=1)
        others = [_wanted(d) for d in details if d["type"] != "literal_error"]
        return "not one of the values here", (f"did you mean {near[0]}? " if near else "") + "use " + " or ".join(
            [expected, *others])
    bounds = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    said = [f"{word} {context[key]}" for key, word in bounds.items() if key in context]
    if said:
        return "out of range", f"use {' and '.join(said)}"
    if detail["type"] == "value_error":
        return "not of this form", f"use {context['error']}"
    if any(one["type"] in ("string_too_short", "too_short") for one in details):
        return "empty", "write what it shall be"
    wanted = " or ".join(dict.fromkeys(map(_wanted, details)))
    if detail["input"] is None and WANTED["dict_type"] in wanted:
        return "nothing", f"leave it out, or use {wanted}"
    if wanted == WANTED["string_type"] and isinstance(detail["input"], bool | int | float | date):
        return "wrong type", "use a text: YAML takes this for one in quotes alone"
    return "wrong type", f"use {wanted}"


def _wanted(detail: ErrorDetails) -> str:
    return WANTED.get(detail["type"], detail["msg"].removeprefix("Input should be ").replace("valid ", ""))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _adapter_faults(document: Document) -> list[Fault]:
    """LoRA keys under another framework's name: AdapterConfig itself takes any key, for PEFT to judge."""
    adapter = document.values.get("adapter")
    if not isinstance(adapter, dict) or method_of(adapter) != "lora":
        return []
    faults = []
    for key in adapter:
        write = FAMILIAR.get(key, "") if isinstance(key, str) else ""
        if write.startswith("adapter.") and write != f"adapter.{key}":
            place = document.place(("adapter", key)) or (None, None)
            faults.append(Fault(kind="config", file=place[0], line=place[1],
                                message=f"unknown key adapter.{key}", mend=f"write {write}"))
    return faults
