"""Cells that were trained in two ways, compared: ratios of their rates, memory and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.speed_cells import Cell

RATE, HELD, WHOLE = "tokens_per_second_of_middle_step", "steps_bytes", "training_s"


def _twins(
    cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]], **other: Any
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each cell that was trained the other way too: its name, and what was found of both."""
    for name, cell in cells.items():
        twin = replace(cell, **other)
        if twin != cell and str(twin) in summaries:
            yield name, summaries[name], summaries[str(twin)]


def _over(found: Mapping[str, Any], other: Mapping[str, Any], figure: str) -> float:
    """Ratio of their medians."""
    ratio: float = found[figure]["median"] / other[figure]["median"]
    return ratio


def overhead_of(
    cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each cell that was trained without the loop too: the ratio of their rates, and the milliseconds that the loop
    adds to the middle step. A small model shows those best, since its steps drown them least."""
    step, ratios, added = "step_p50_s", {}, {}
    for name, found, bare in _twins(cells, summaries, bare=True):
        ratios[f"{name}: loop over bare loop"] = _over(found, bare, RATE)
        added[name] = 1000 * (found[step]["median"] - bare[step]["median"])
    return ratios, added


def allocators_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster tcmalloc makes each cell that was trained with it too, and how much more glibc holds."""
    ratios = {}
    for name, found, other in _twins(cells, summaries, tcmalloc=True):
        ratios[f"{name}: speed under tcmalloc over glibc"] = _over(other, found, RATE)
        ratios[f"{name}: memory in steps under glibc over tcmalloc"] = _over(found, other, HELD)
    return ratios


def reuse_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster each cell's steps are than where frozen layers are computed each time, and the whole of it: from
    the launch to the last step's end, with what computing them once takes."""
    ratios = {}
    for name, found, anew in _twins(cells, summaries, reuse=False):
        ratios[f"{name}: speed of a step"] = _over(found, anew, RATE)
        ratios[f"{name}: speed from the launch to the last step"] = _over(anew, found, WHOLE)
    return ratios


def products_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How fast and how large each cell is in bfloat16 over its twin in float32, and over torch's own products."""
    ratios = {}
    for name, found, other in _twins(cells, summaries, dtype="float32"):
        ratios[f"{name}: speed over float32"] = _over(found, other, RATE)
        ratios[f"{name}: memory in steps over float32"] = _over(found, other, HELD)
    for name, found, other in _twins(cells, summaries, native=True):
        ratios[f"{name}: speed over torch's products"] = _over(found, other, RATE)
    return ratios


def sizes_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster each cell is with packed rows of few sizes than of any, and how much more memory it takes."""
    ratios = {}
    for name, found, other in _twins(cells, summaries, any_size=True):
        ratios[f"{name}: speed over rows of any size"] = _over(found, other, RATE)
        ratios[f"{name}: memory in steps over rows of any size"] = _over(found, other, HELD)
    return ratios


def devices_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster each cell is than with attention of one sequence after another, and than without compiled parts,
    and how much more memory it takes; on a GPU, of what it has allocated."""
    ratios = {}
    for words, other in (("attention one by one", {"one_by_one": True}), ("plain parts", {"parts": False})):
        for name, found, twin in _twins(cells, summaries, **other):
            ratios[f"{name}: speed over {words}"] = _over(found, twin, RATE)
            held = "peak_allocated_bytes" if "peak_allocated_bytes" in found else HELD
            ratios[f"{name}: memory in steps over {words}"] = _over(found, twin, held)
    return ratios
