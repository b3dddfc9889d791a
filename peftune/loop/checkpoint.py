"""Checkpoints as they lie on disk: found, verified and loaded, in safe formats only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from peftune.disk import sha256
from peftune.errors import Fault, RunFolderError
from peftune.loop.state import TrainState
from peftune.model.folder import holds_weights
from peftune.parallel.pieces import PieceReader
from peftune.parallel.strategy import Strategy

MANIFEST = "manifest.json"
SAFE = ".safetensors"
FREE_KEYS = ("output_dir", "resume", "deadline", "hang_timeout", "log", "checkpoint", "train.tokens_per_micro_batch",
             "train.max_skipped_steps")
"""Config keys that may differ between a checkpoint and the run that continues it: none changes the training."""


def folder_of(run_folder: Path, step: int) -> Path:
    """checkpoints/step-000100 of a run."""
    return run_folder / "checkpoints" / f"step-{step:06d}"


def run_of(checkpoint: Path) -> Path:
    """The run folder in which a checkpoint lies, if it lies in one."""
    return checkpoint.resolve().parent.parent


def all_checkpoints(run_folder: Path) -> list[Path]:
    """Published checkpoints, oldest first. Folders of other names, such as copies of them, are somebody's own."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if folder.name.removeprefix("step-").isdecimal()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def outdated(run_folder: Path, step: int, keep: int) -> list[Path]:
    """Checkpoints that the one of `step` replaces, where the newest `keep` stay. Those of later steps count for
    nothing: the run has gone on from one before them, since they are damaged."""
    newest = folder_of(run_folder, step)
    return [folder for folder in all_checkpoints(run_folder) if _step_of(folder) <= _step_of(newest)][:-keep]


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
        states = load_file(folder / f"random{SAFE}")
        state = TrainState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from None
    known = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    other = sorted(name for name in reader.names() if "|" not in name and name not in known)
    if other:
        raise _damaged(folder, f"holds weights that this run does not train: {', '.join(other[:3])}")
    mine = {kind: states[f"{world.rank}.{kind}"] for kind in ("cpu", "device") if f"{world.rank}.{kind}" in states}
    if mine:  # a rank that the saved run did not have keeps its own seed
        try:
            torch.set_rng_state(mine["cpu"])
        except (TypeError, RuntimeError) as error:
            raise _damaged(folder, f"random{SAFE}: {error}") from None
        if "device" in mine and world.device.type == "cuda":
            torch.cuda.set_rng_state(mine["device"], world.device)
    return state


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what a checkpoint holds, or lies where a run keeps its own; it may be damaged."""
    place = folder.resolve()
    here = place.parent.name == "checkpoints" and place.name.startswith("step-") and place.is_dir()
    return ((folder / "state.json").is_file() or here) and not holds_weights(folder)


@torch.no_grad()
def load_weights_of(folder: Path, model: nn.Module, published: Path) -> None:
    """Put a checkpoint's weights, and nothing else of it, into a model that was loaded from a published folder.

    Raises:
        RunFolderError: the checkpoint is damaged, or its weights are not those that the folder has.
    """
    verify(folder)
    try:
        reader = PieceReader(sorted(folder.glob(f"tensors-*{SAFE}")))
        read = ((name, reader(name)) for name in reader.names() if "|" not in name)
        found = {name: tensor for name, tensor in read if tensor is not None}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from None
    live, adapter = dict(model.named_parameters()), published / f"adapter_model{SAFE}"
    wanted = len(load_file(adapter)) if adapter.is_file() else len(live)
    if len(found) != wanted or any(name not in live or tensor.shape != live[name].shape
                                   for name, tensor in found.items()):
        raise RunFolderError(Fault(
            kind="run_folder", file=str(folder), message="its weights are published in another form than they train "
            f"in, and cannot be put into the model of {published}", mend=f"give {published}"))
    for name, tensor in found.items():
        live[name].copy_(tensor)


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
            if Path(name).name != name or sha256(folder / name) != expected:
                raise _damaged(folder, f"{name} has another checksum than the manifest says")
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is there and passes its checksums."""
    try:
        verify(folder)
    except RunFolderError:
        return False
    return True


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


def what_has_weights(run: Path) -> str:
    """The mend where a folder of a run has no weights: those that have some."""
    final, best = (holds_weights(run / name) for name in ("final", "best"))
    mend = f"give {run}" if final else "let the run finish: start it again and it continues"
    return f"{mend}; or give {run / 'best'}" if best else mend
