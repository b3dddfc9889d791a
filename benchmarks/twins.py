"""Cells that were trained in two ways, compared: ratios of their rates, memory and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.speed_cells import Cell


def _twins(
    cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]], **other: Any
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each cell that was trained the other way too: its name, and what was found of both."""
    for name, cell in cells.items():
        twin = replace(cell, **other)
        if twin != cell and str(twin) in summaries:
            yield name, summaries[name], summaries[str(twin)]


def overhead_of(
    cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Of each cell that was trained without the loop too: the ratio of their rates, and the milliseconds that the loop
    adds to the middle step. A small model shows those best, since its steps drown them least."""
    rate, step, ratios, added = "tokens_per_second_of_middle_step", "step_p50_s", {}, {}
    for name, found, bare in _twins(cells, summaries, bare=True):
        ratios[f"{name}: loop over bare loop"] = found[rate]["median"] / bare[rate]["median"]
        added[name] = 1000 * (found[step]["median"] - bare[step]["median"])
    return ratios, added


def allocators_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster tcmalloc makes each cell that was trained with it too, and how much more glibc holds."""
    rate, held, ratios = "tokens_per_second_of_middle_step", "steps_bytes", {}
    for name, found, other in _twins(cells, summaries, tcmalloc=True):
        ratios[f"{name}: speed under tcmalloc over glibc"] = other[rate]["median"] / found[rate]["median"]
        ratios[f"{name}: memory in steps under glibc over tcmalloc"] = found[held]["median"] / other[held]["median"]
    return ratios


def reuse_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster each cell's steps are than where frozen layers are computed each time, and the whole of it: from
    the launch to the last step's end, with what computing them once takes."""
    rate, whole, ratios = "tokens_per_second_of_middle_step", "training_s", {}
    for name, found, anew in _twins(cells, summaries, reuse=False):
        ratios[f"{name}: speed of a step"] = found[rate]["median"] / anew[rate]["median"]
        ratios[f"{name}: speed from the launch to the last step"] = anew[whole]["median"] / found[whole]["median"]
    return ratios


def products_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How fast and how large each cell is in bfloat16 over its twin in float32, and over torch's own products."""
    rate, held, ratios = "tokens_per_second_of_middle_step", "steps_bytes", {}
    for name, found, other in _twins(cells, summaries, dtype="float32"):
        ratios[f"{name}: speed over float32"] = found[rate]["median"] / other[rate]["median"]
        ratios[f"{name}: memory in steps over float32"] = found[held]["median"] / other[held]["median"]
    for name, found, other in _twins(cells, summaries, native=True):
        ratios[f"{name}: speed over torch's products"] = found[rate]["median"] / other[rate]["median"]
    return ratios


def sizes_of(cells: Mapping[str, Cell], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How much faster each cell is with packed rows of few sizes than of any, and how much more memory it takes."""
    rate, held, ratios = "tokens_per_second_of_middle_step", "steps_bytes", {}
    for name, found, other in _twins(cells, summaries, any_size=True):
        ratios[f"{name}: speed over rows of any size"] = found[rate]["median"] / other[rate]["median"]
        ratios[f"{name}: memory in steps over rows of any size"] = found[held]["median"] / other[held]["median"]
    return ratios
