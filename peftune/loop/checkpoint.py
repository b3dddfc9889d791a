"""Checkpoints: everything to continue bit for bit, written whole or not at all, in safe formats only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.errors import Fault, RunFolderError
from peftune.loop.publish import draft_of, published, write_json, write_text
from peftune.loop.state import TrainState
from peftune.parallel.pieces import PieceReader, write_pieces
from peftune.parallel.strategy import Strategy

MANIFEST = "manifest.json"
SAFE = ".safetensors"
FREE_KEYS = ("output_dir", "resume", "deadline", "log", "checkpoint", "train.tokens_per_micro_batch")
"""Config keys that may differ between a checkpoint and the run that continues it: none changes the training."""


def folder_of(run_folder: Path, step: int) -> Path:
    """checkpoints/step-000100 of a run."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def all_checkpoints(run_folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted((run_folder / "checkpoints").glob("step-*"))


def save_checkpoint(
    run_folder: Path, state: TrainState, model: nn.Module, optimizer: Optimizer, strategy: Strategy, *,
    config_yaml: str, keep: int,
) -> bool:
    """Write the checkpoint of `state` and delete all but the newest `keep`; return False if it was there already.

    Every rank writes what it holds of the trained weights and the optimizer's state into a file of its own; no rank
    gathers them. Whatever strategy and number of ranks can read them again.

    Args:
        run_folder: the run's output folder.
        state: what has been done.
        model: unwrapped; its trainable weights are saved.
        optimizer: its state is saved by weight name.
        strategy: knows which part of them this rank holds; the random state of every rank is saved too.
        config_yaml: the resolved config, to be compared on resuming.
        keep: checkpoints to keep.
    """
    folder, world = folder_of(run_folder, state.step), strategy.world
    random_states = world.gather([_random_state(world.device)])
    if world.on_main(folder.exists):
        return False
    with published(folder) if world.is_main else contextlib.nullcontext(draft_of(folder)) as draft:
        world.barrier()  # the draft is there
        write_pieces(strategy.pieces(model, optimizer), draft / f"tensors-{world.rank:05d}-of-{world.ranks:05d}{SAFE}")
        world.barrier()  # every rank has written
        if world.is_main:
            save_file({f"{rank}.{kind}": tensor for rank, states in enumerate(random_states)
                       for kind, tensor in states.items()}, draft / f"random{SAFE}")
            write_json(draft / "state.json", state.as_json())
            write_text(draft / "config.yaml", config_yaml)
            sums = {file.name: _sha256(file) for file in sorted(draft.iterdir())}
            write_json(draft / MANIFEST, {"step": state.step, "world_size": world.ranks, "strategy": strategy.name,
                                          "sha256": sums})
    if world.is_main:
        for old in all_checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return True


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, strategy: Strategy) -> TrainState:
    """Put a checkpoint back into model, optimizer and random generators.

    Raises:
        RunFolderError: the checkpoint is damaged, or holds other weights than the model trains.
    """
    world = strategy.world
    world.on_main(lambda: verify(folder))
    try:
        reader = PieceReader(sorted(folder.glob(f"tensors-*{SAFE}")))
        strategy.restore(model, optimizer, reader)
    except (KeyError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from None
    known = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = sorted(name for name in reader.names() if "|" not in name and name not in known)
    if other:
        raise _damaged(folder, f"holds weights that this run does not train: {', '.join(other[:3])}")
    states = load_file(folder / f"random{SAFE}")
    mine = {kind: states[f"{world.rank}.{kind}"] for kind in ("cpu", "device") if f"{world.rank}.{kind}" in states}
    if mine:  # a rank that the saved run did not have keeps its own seed
        torch.set_rng_state(mine["cpu"])
        if "device" in mine and world.device.type == "cuda":
            torch.cuda.set_rng_state(mine["device"], world.device)
    return TrainState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes its checksums, and what was wrong with newer ones."""
    wrong = []
    for folder in reversed(all_checkpoints(run_folder)):
        try:
            verify(folder)
        except RunFolderError as error:
            wrong.append(str(error))
        else:
            return folder, wrong
    return None, wrong


def verify(folder: Path) -> None:
    """Raise RunFolderError unless every file has the content its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["sha256"].items():
            if Path(name).name != name or _sha256(folder / name) != expected:
                raise _damaged(folder, f"{name} has another checksum than the manifest says")
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None


def differing_keys(mine: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: theirs -> mine` for every setting that would change the training."""
    result = []
    for key in sorted({*mine, *other}):
        path = prefix + key
        if path in FREE_KEYS:
            continue
        left, right = other.get(key), mine.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            result += differing_keys(right, left, f"{path}.")
        elif left != right:
            result.append(f"{path}: {left!r} -> {right!r}")
    return result


def _damaged(folder: Path, reason: str) -> RunFolderError:
    return RunFolderError(Fault(kind="run_folder", file=str(folder), message=f"damaged checkpoint: {reason}",
                                mend="delete it; resume=auto takes the one before it"))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
