"""What stands in a column of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftune.data.targets import RowFault


def kind_of(value: object) -> str:
    """What a value is, for a person."""
    names = {type(None): "null", list: "a list", dict: "a record", str: "a text", bool: "true or false"}
    return names.get(type(value), f"the number {value!r:.40}" if isinstance(value, int | float) else "not text")


def text_of(values: Mapping[str, Any], key: str, *, empty: bool = False) -> str:
    """The text in a column.

    Args:
        values: of the row.
        key: the column.
        empty: whether it may be empty.

    Raises:
        RowFault: there is none.
    """
    if key not in values:
        raise RowFault(f"the key {key} is missing", f"add {key}, or delete the row")
    value = values[key]
    if not isinstance(value, str):
        raise RowFault(f"{key} is {kind_of(value)}, not a text", "write it in quotes, or delete the row")
    if not empty and not value.strip():
        raise RowFault(f"{key} is empty", f"fill in {key}, or delete the row")
    return value
