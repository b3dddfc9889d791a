"""Saved tensors in pieces: each rank writes what it holds, and any number of ranks reads them again.

A piece is a run of a tensor's values in row-major order. It is all that a divided weight is under every engine: whole
rows under FSDP2, runs of the flattened tensor under ZeRO.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PLACES = "places"
"""Key in a file's header: JSON {name: [first value, shape of the whole tensor]}."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of values of a named tensor."""

    name: str
    values: Tensor
    """[n], any device."""
    begin: int
    """Position of the first value in the flattened whole."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


def whole(name: str, tensor: Tensor) -> Piece:
    """A piece that is all of its tensor."""
    return Piece(name, tensor.detach().flatten(), 0, tuple(tensor.shape))


def write_pieces(pieces: Iterable[Piece], path: Path) -> None:
    """One safetensors file, straight from the memory of tensors on the CPU. A rank that holds nothing writes none."""
    tensors, places = {}, {}
    seen: set[int] = set()
    for piece in pieces:
        values = piece.values.detach().to("cpu").contiguous()
        # safetensors refuses names that share memory, as those of a step count or a table kept once for many weights
        tensors[piece.name] = values.clone() if values.data_ptr() in seen else values
        seen.add(tensors[piece.name].data_ptr())
        places[piece.name] = [piece.begin, list(piece.shape)]
    if tensors:
        save_file(tensors, path, metadata={PLACES: json.dumps(places)})


class PieceReader:
    """Whole tensors out of the files of all ranks, one at a time."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises KeyError or ValueError where a file is not one of `write_pieces`."""
        self._places: dict[str, list[tuple[Path, int, tuple[int, ...]]]] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                places = json.loads((file.metadata() or {})[PLACES])
            for name, (begin, shape) in places.items():
                if min(shape, default=0) < 0:
                    raise ValueError(f"{name} has no shape: {shape}")
                self._places.setdefault(name, []).append((path, begin, tuple(shape)))

    def names(self) -> Iterator[str]:
        """Of every saved tensor."""
        return iter(self._places)

    def __call__(self, name: str) -> Tensor | None:
        """The whole tensor, or None. Raises KeyError where pieces are missing, ValueError where they do not fit."""
        if name not in self._places:
            return None
        shape = self._places[name][0][2]
        held = 0
        for path, _, _ in self._places[name]:
            with safe_open(path, "pt") as file:
                held += math.prod(file.get_slice(name).get_shape())
        if held < math.prod(shape):  # before memory is asked for: a damaged header may name any shape
            raise KeyError(f"parts of {name} are missing")
        flat, covered = None, 0
        for path, begin, _ in sorted(self._places[name], key=lambda place: place[1]):
            with safe_open(path, "pt") as file:
                values = file.get_tensor(name)
            if flat is None:
                flat = torch.empty(math.prod(shape), dtype=values.dtype)
            if begin > covered:
                break
            if begin < 0 or begin + values.numel() > flat.numel():
                raise ValueError(f"{name} does not lie where its file says")
            flat[begin : begin + values.numel()] = values
            covered = max(covered, begin + values.numel())
        if flat is None or covered < flat.numel():
            raise KeyError(f"parts of {name} are missing")
        return flat.reshape(shape)
