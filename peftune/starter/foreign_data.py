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
    """A list of data sets, and the share to validate with."""
    sources = []
    for number, given in enumerate(take("datasets", [])):
        entry = dict(given)
        path, files = entry.pop("path"), entry.pop("data_files", None)
        if files is not None:
            path = files if isinstance(files, str) else files[0]
            if not isinstance(files, str) and len(files) > 1:
                leave(f"datasets[{number}].data_files", files[1:], "one source each: add them to data.train")
        name = entry.pop("name", None)
        sources.append({"path": f"{path}:{name}" if name else path, "split": entry.pop("split", None) or "train"})
        entry.pop("ds_type", None)
        if str(entry.pop("type", "")).partition(":")[0] == "completion":
            ours |= {"data.format": "text", "data.too_long": "split"}
        for key, value in entry.items():
            leave(f"datasets[{number}].{key}", value, "formats are found from the columns; data.columns renames them")
    ours["data.train"] = sources or "data/train.jsonl"
    share = take("val_set_size", 0)
    ours["data.validation"] = share if 0 < share < 1 else None
    if share >= 1:
        leave("val_set_size", share, "data.validation is a share, or a file")
