"""Folders spoilt file by file: cut, swapped, pickled, with other values, types and shapes."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_values import NESTED, ODD_TEXTS, Draw, spoilt_bytes


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle was executed",))


PICKLED = pickle.dumps({"weight": Payload()})
PICKLES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "training_args.bin",
    "random.pt",
    "model.pt",
    "scheduler.pt",
    "rng_state.pth",
)


@dataclass(frozen=True, slots=True)
class Spoil:
    """What is done to one file of a folder."""

    file: int
    how: str
    value: Any
    bytes_seed: bytes


@st.composite
def spoils(draw: Draw) -> tuple[list[Spoil], bool]:
    """Some spoils, and whether checksums are written anew, so that what lies behind them is reached."""
    hows = (
        "cut",
        "bytes",
        "empty",
        "delete",
        "folder",
        "link",
        "swap",
        "json",
        "json",
        "json",
        "tensor",
        "tensor",
        "pickle",
        "dtype",
    )
    several = [
        Spoil(draw(st.integers(0, 30)), how, _value(draw, how), draw(st.binary(min_size=8, max_size=8)))
        for how in draw(st.lists(st.sampled_from(hows), min_size=1, max_size=3))
    ]
    return several, draw(st.booleans())


def _value(draw: Draw, how: str) -> Any:
    if how == "json":
        return [
            (draw(st.integers(0, 40)), draw(st.one_of(NESTED, st.just("delete me"))))
            for _ in range(draw(st.integers(1, 3)))
        ]
    if how == "bytes":
        return spoilt_bytes(draw, b"\x01" * 200)
    return draw(st.integers(0, 1000))


def spoil(folder: Path, spoilt: tuple[list[Spoil], bool]) -> None:
    """Do it to the files of a folder."""
    several, sums = spoilt
    for one in several:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            _spoil_file(files[one.file % len(files)], files, one)
    if sums:
        for manifest in folder.rglob("manifest.json"):
            _write_sums(manifest)


def _spoil_file(file: Path, files: list[Path], one: Spoil) -> None:
    content = file.read_bytes()
    match one.how:
        case "cut":
            file.write_bytes(content[: len(content) * one.value // 1000])
        case "bytes":
            at = len(content) * one.bytes_seed[0] // 256
            file.write_bytes(content[:at] + one.value + content[at + len(one.value) :])
        case "empty":
            file.write_bytes(b"")
        case "delete":
            file.unlink()
        case "folder":
            file.unlink()
            file.mkdir()
        case "link":
            file.unlink()
            file.symlink_to(("/dev/null", "/etc/passwd", file.name, "/nonexistent", "..")[one.value % 5])
        case "swap":
            other = files[one.value % len(files)]
            theirs = other.read_bytes()
            other.write_bytes(content)
            file.write_bytes(theirs)
        case "pickle":
            (file.parent / PICKLES[one.value % len(PICKLES)]).write_bytes(PICKLED)
            if file.suffix == ".safetensors":
                if one.value % 2:
                    file.unlink()
                else:
                    file.write_bytes(PICKLED)
        case "json":
            _spoil_json(file, one.value)
        case _:
            _spoil_tensor(file, one)


def _spoil_json(file: Path, changes: list[tuple[int, Any]]) -> None:
    try:
        values = yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text())
    except (ValueError, yaml.YAMLError):
        return
    for number, value in changes:
        at, key = _inside(values, number)
        if at is None:
            continue
        if value == "delete me" and isinstance(at, dict):
            at.pop(key)
        else:
            at[key] = value
    file.write_text(json.dumps(values), encoding="utf-8")


def _inside(values: Any, number: int) -> tuple[Any, Any]:
    """The number-th place among all keys and indices of nested values."""
    places = []
    waiting = [values]
    while waiting and len(places) < 500:
        at = waiting.pop()
        for key, value in at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ():
            places.append((at, key))
            waiting.append(value)
    return places[number * 7 % len(places)] if places else (None, None)


def _spoil_tensor(file: Path, one: Spoil) -> None:
    if file.suffix != ".safetensors":
        return
    try:
        tensors = load_file(file)
    except SafetensorError:
        return
    if not tensors:
        return
    name = sorted(tensors)[one.value % len(tensors)]
    tensor = tensors[name]
    others = (
        tensor[:0],
        tensor.flatten(),
        tensor.unsqueeze(0),
        tensor.repeat(2) if tensor.dim() == 1 else tensor.t().contiguous() if tensor.dim() == 2 else tensor,
        tensor.to(torch.float16),
        tensor.to(torch.int8),
        torch.full_like(tensor.float(), float("nan")),
        tensor.to(torch.float8_e4m3fn),
        torch.ones(()),
    )
    kind = one.bytes_seed[0] % (len(others) + 2)
    if kind == len(others):
        del tensors[name]
    elif kind == len(others) + 1:
        tensors["../" + ODD_TEXTS[0] + "x"] = tensors.pop(name)
    else:
        tensors[name] = others[kind].contiguous().clone()
    metadata = _metadata(file)
    if one.how == "dtype" and metadata and "places" in metadata:
        places = json.loads(metadata["places"])
        _spoil_places(places, one)
        metadata["places"] = json.dumps(places)
    save_file(tensors, file, metadata=metadata)


def _spoil_places(places: Any, one: Spoil) -> None:
    at, key = _inside(places, one.value)
    if at is not None:
        at[key] = (-1, 10**9, [10**6, 10**6], None, "x", [], 2**62, [-1])[one.bytes_seed[1] % 8]


def _metadata(file: Path) -> dict[str, str] | None:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__")


def _write_sums(manifest: Path) -> None:
    try:
        values = json.loads(manifest.read_text())
        if isinstance(values.get("sha256"), dict):
            values["sha256"] = {
                name: hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest()
                for name in values["sha256"]
                if (manifest.parent / name).is_file() and not (manifest.parent / name).is_symlink()
            }
            manifest.write_text(json.dumps(values))
    except (ValueError, OSError, AttributeError):
        return
