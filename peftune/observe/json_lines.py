"""Files of JSON Lines, as runs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The record of each line. Raises OSError, and ValueError that names a line that is no JSON.

    A line ends at a line feed alone: texts may hold what else ends one (U+2028, U+0085), and JSON leaves it as it is.
    """
    records = []
    with path.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return records
