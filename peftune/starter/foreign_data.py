"""The data sections of LLaMA-Factory's and Axolotl's configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Take = Callable[..., Any]
"""Key, default -> its value, which is done with then."""
Leave = Callable[[str, Any, str], None]
"""Key, value, why it is not taken over."""
READ = {"file_name", "hf_hub_url", "subset", "split", "formatting", "ranking", "columns", "tags"}
"""What is read of a data set in dataset_info.json."""
TYPES = frozenset(("", "alpaca", "sharegpt", "chat_template"))
"""Of Axolotl's data sets: what the columns of their rows show."""


def llamafactory_data(take: Take, ours: dict[str, Any], leave: Leave) -> None:
    """Data sets by their names in dataset_info.json, and the share or sets to validate with."""
    folder = Path(take("dataset_dir", "data"))
    register = folder / "dataset_info.json"
    known = json.loads(register.read_text(encoding="utf-8")) if register.is_file() else {}
    most = take("max_samples")
    for key, section, default in (("dataset", "data.train", ""), ("eval_dataset", "data.validation", None)):
        names = take(key, default)
        if names is None:
            continue
        listed = names if isinstance(names, list) else str(names).split(",")
        sources = [_registered(name.strip(), known, folder, ours, leave) for name in listed]
        if most is not None:
            sources = [{**source, "max_rows": most} for source in sources]
        ours[section] = sources
    share = take("val_size", 0)
    if "data.validation" not in ours:
        ours["data.validation"] = share if 0 < share < 1 else None
        if share >= 1:
            leave("val_size", share, "data.validation is a share, or a file")


def _registered(name: str, known: Any, folder: Path, ours: dict[str, Any], leave: Leave) -> dict[str, Any]:
    entry = known.get(name)
    if entry is None:
        leave("dataset", name, f"{folder / 'dataset_info.json'} does not name it: write its path or hub id")
        return {"path": name or "data/train.jsonl"}
    columns = dict(entry.get("columns", {}))
    if entry.get("ranking") and entry.get("formatting", "alpaca") == "alpaca":
        ours["data.columns"] = {"prompt": columns.pop("prompt", "instruction")}
    elsewhere = {"ms_hub_url", "om_hub_url"} if "hf_hub_url" in entry else set()
    for key in [key for key in entry if key not in READ | elsewhere]:
        leave(f"dataset_info: {name}.{key}", entry[key], "has no counterpart here")
    for key, value in {"columns": columns, "tags": entry.get("tags")}.items():
        if value:
            leave(f"dataset_info: {name}.{key}", value, "say with data.columns what each column is")
    if "file_name" in entry:
        return {"path": str(folder / entry["file_name"])}
    path = entry.get("hf_hub_url", name) + (f":{entry['subset']}" if "subset" in entry else "")
    return {"path": path, "split": entry.get("split", "train")}


def axolotl_data(take: Take, ours: dict[str, Any], leave: Leave) -> None:
    """Lists of data sets to learn from and to validate with, or the share to validate with."""
    given = take("datasets", [])
    kinds = [str(entry.get("type", "")).partition(":")[0] for entry in given]
    texts = set(kinds) == {"completion"}
    if texts:
        ours |= {"data.format": "text", "data.too_long": "split"}
    found = TYPES | {"completion"} if texts else TYPES
    ours["data.train"] = _sources("datasets", given, found, leave) or "data/train.jsonl"
    share = take("val_set_size", 0)
    ours["data.validation"] = _sources("test_datasets", take("test_datasets", []), found, leave) or (
        share if 0 < share < 1 else None)
    if share >= 1:
        leave("val_set_size", share, "data.validation is a share, or a file")


def _sources(key: str, entries: list[Any], found: frozenset[str], leave: Leave) -> list[dict[str, Any]]:
    """One source for each file, or data set of the hub. `found`: types that need no word, since rows show them."""
    sources = []
    for number, given in enumerate(entries):
        entry = dict(given)
        path, files = entry.pop("path"), entry.pop("data_files", None)
        name, split = entry.pop("name", None), entry.pop("split", None) or "train"
        paths = [f"{path}:{name}" if name else path] if files is None else [files] if isinstance(files, str) else files
        sources += [{"path": one, "split": split} for one in paths]
        entry.pop("ds_type", None)
        if str(entry.get("type", "")).removesuffix(".default") in found:
            entry.pop("type", None)
        for name, value in entry.items():
            leave(f"{key}[{number}].{name}", value, "formats are found from the columns; data.columns renames them")
    return sources
