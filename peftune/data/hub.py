"""Data sets of the Hugging Face hub. The only file that imports datasets."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftune.config.schema import Source
from peftune.data.rows import RawRow, record_of
from peftune.errors import DataError, Fault, MachineError


def read_hub(source: Source) -> Iterator[RawRow]:
    """Rows of a hub data set; numbers that stand for names become the names."""
    data = _load_hub(source)
    if source.streaming and source.shuffle_buffer is not None:
        data = data.shuffle(seed=0, buffer_size=source.shuffle_buffer)
    names = _class_names(data.features)
    for number, values in enumerate(data, start=1):
        yield RawRow(record_of(values, names), source.path, number)


def hub_fingerprint(source: Source) -> str:
    """What identifies a hub data set; the version it gives itself where it is streamed."""
    data = _load_hub(source)
    return str(data.info.version) if source.streaming else str(data._fingerprint)


def _class_names(features: Any) -> dict[str, list[str]]:
    """Columns whose numbers stand for names -> the names; also where each row holds a list of them."""
    found = {}
    for column, feature in (features or {}).items():
        names = getattr(getattr(feature, "feature", feature), "names", None)  # lists wrap a feature; few have names
        if names:
            found[column] = list(names)
    return found


def _load_hub(source: Source) -> Any:
    """A `datasets` data set for `org/name`, or `org/name:configuration`; later calls take it from the local cache."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise MachineError(
            Fault(kind="environment", message=f"{source.path} is no file here; hub ids need the package datasets",
                  mend="pip install datasets, or give the path of a file")
        ) from None
    name, _, configuration = source.path.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=source.split, streaming=source.streaming)
    except Exception as error:  # the hub client raises many unrelated types; all mean: cannot be had
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise DataError(
            Fault(kind="data", file=source.path, mend=f"paths are relative to the current folder, {Path.cwd()}",
                  message=f"neither a file here nor a data set that can be reached: {reason}")
        ) from error


def refuse_hub_settings(source: Source) -> None:
    """Raise DataError where a source that is files has settings that only hub data sets follow."""
    for key, is_set in (("split", source.split != "train"), ("streaming", source.streaming)):
        if is_set:
            raise DataError(Fault(
                kind="data", file=source.path, message=f"{key} is for data sets of the hub, and here are files",
                mend=f"leave {key} out, or name a data set of the hub"))
