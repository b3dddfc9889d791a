"""Records without their answers -> examples to predict from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from peftune.data.canonical import refuse_surrogates
from peftune.data.examples import Example
from peftune.data.rows import RawRow
from peftune.data.targets import RowFault
from peftune.errors import DataError, Fault
from peftune.tasks.task import BoundEncoder


def prompts_of(rows: Iterable[RawRow], encoder: BoundEncoder, columns: Mapping[str, str]) -> list[Example]:
    """Records as examples to predict from, each with its own `id` or its row number.

    Raises:
        DataError: records that cannot be predicted from, with their lines.
    """
    examples: list[Example] = []
    faults: list[Fault] = []
    for number, raw in enumerate(rows):
        values = {**raw.values, **{want: raw.values[given] for want, given in columns.items() if given in raw.values}}
        try:
            refuse_surrogates(values)
            found = encoder.task.encode_prompt(values, encoder.text)
        except RowFault as error:
            faults.append(Fault(kind="data", file=raw.file, line=raw.line, message=error.message, mend=error.mend))
            continue
        own = str(number) if values.get("id") is None else values["id"]
        examples += [replace(example, targets=example.targets or [0], record={
            **example.record, "id": own if isinstance(own, str | int) else str(own)}) for example in found]
    if faults:
        raise DataError(faults)
    return examples
