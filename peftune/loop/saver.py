"""Writing checkpoints: everything to continue bit for bit, whole or not at all; large ones while the steps go on."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.disk import flush, sha256
from peftune.errors import Fault, RunFolderError, Unwritable
from peftune.loop.checkpoint import MANIFEST, SAFE, folder_of, is_whole, outdated, verify
from peftune.loop.publish import (
    draft_of,
    open_draft,
    publish_draft,
    refuse_vanished,
    remove,
    write_json,
    write_text,
    writing,
)
from peftune.loop.self_check import check_weights
from peftune.loop.state import TrainState
from peftune.parallel.host_memory import free_bytes, given_back_bytes
from peftune.parallel.names import processes_here
from peftune.parallel.pieces import Piece, write_pieces
from peftune.parallel.strategy import Strategy

BACKGROUND_BYTES = 64 * 2**20
"""A rank with more than this to save copies it and writes the copy while it trains, if asynchronous is auto."""
LOOKING_S = 0.02


@dataclass(slots=True)
class Written:
    """A checkpoint on its way to the disk."""

    own: Future[None]
    """This rank's file."""
    published: Future[None] | None
    """The whole; on the main process."""
    given_up: threading.Event
    seconds: list[float]
    """How long it took, once it is there."""
    told: bool = False
    """The user knows that it has failed."""


class Saver:
    """Writes a run's checkpoints, one at a time.

    Every rank writes what it holds of the trained weights and the optimizer's state into a file of its own; no rank
    gathers them. Files are written by a thread, which talks to no other rank: the main process's sees the others'
    files appear, and publishes. The two ways differ in whether the loop waits for it, and in the thread's priority.
    """

    def __init__(
        self, run_folder: Path, strategy: Strategy, *, config_yaml: str, keep: int,
        asynchronous: bool | Literal["auto"],
    ) -> None:
        """See `checkpoint` in the config. `config_yaml` is compared on resuming."""
        self._run_folder, self._strategy, self._config_yaml, self._keep = run_folder, strategy, config_yaml, keep
        self._asynchronous = asynchronous
        self._waited_for = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._beside_steps = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-beside", initializer=_give_way)
        self._running: Written | None = None
        self.told = False
        """Whether `news` has said why the last checkpoint that `settle` waited for has failed."""

    def save(self, state: TrainState, model: nn.Module, optimizer: Optimizer, *, wait: bool) -> float:
        """Write the checkpoint of `state`, unless it is there and whole. All ranks call it, after `settle`.

        Args:
            state: what has been done.
            model: unwrapped; its trainable weights are saved.
            optimizer: its state is saved by weight name.
            wait: return when it is published.

        Returns:
            Seconds that it took; 0 if it is not published yet, or was there.

        Raises:
            Unwritable: the disk refuses, on whichever rank; raised on all of them. Nothing else has changed.
            SelfCheckError: a weight is not finite; nothing is written.
        """
        folder, world = folder_of(self._run_folder, state.step), self._strategy.world
        if world.on_main(lambda: is_whole(folder)):
            return 0.0
        started = time.perf_counter()
        check_weights(model, self._strategy)
        world.on_main(lambda: _new_draft(self._run_folder, folder))
        pieces = list(self._strategy.pieces(model, optimizer))
        wait = wait or not self._in_background(pieces)
        if not wait:
            pieces = [replace(piece, values=piece.values.detach().to("cpu", copy=True)) for piece in pieces]
        ranks = world.gather([(_random_state(world.device), bool(pieces))])
        files = [draft_of(folder) / f"tensors-{rank:05d}-of-{world.ranks:05d}{SAFE}" for rank in range(world.ranks)]
        expected = [file for file, (_, holds) in zip(files, ranks, strict=True) if holds]
        random_states, given_up, seconds = [states for states, _ in ranks], threading.Event(), list[float]()
        thread = self._waited_for if wait else self._beside_steps
        own = thread.submit(_write_own, pieces, files[world.rank])

        def publish() -> None:
            try:
                own.result()
                if _appeared(expected, given_up):
                    self._publish(folder, state, random_states)
            finally:
                shutil.rmtree(draft_of(folder), ignore_errors=True)  # its room may be what others need
            seconds.append(time.perf_counter() - started)

        self._running = Written(own, thread.submit(publish) if world.is_main else None, given_up, seconds)
        return self.settle() if wait else 0.0

    def settle(self) -> float:
        """Wait until the checkpoint on its way is published; return the seconds that it took, 0 if there was none.

        All ranks call it, as often.

        Raises:
            Unwritable: the disk refused, on whichever rank; raised on all of them.
        """
        running, self._running = self._running, None
        if running is None:
            return 0.0
        self.told = running.told
        refusals = self._strategy.world.gather([_refusal(running.own)])
        if any(refusals):
            running.given_up.set()
        return self._strategy.world.on_main(lambda: _outcome(running, refusals))

    def news(self) -> str:
        """Why the checkpoint on its way has failed: once, as soon as this rank knows. Waits for nothing."""
        running = self._running
        if running is None or running.told:
            return ""
        ended = (future for future in (running.own, running.published) if future is not None and future.done())
        refusal = next(filter(None, map(_refusal, ended)), "")
        running.told = bool(refusal)
        return refusal

    def _in_background(self, pieces: Sequence[Piece]) -> bool:
        if self._asynchronous != "auto":
            return self._asynchronous
        size = sum(piece.values.numel() * piece.values.element_size() for piece in pieces)
        free = free_bytes(processes_here())  # each of them copies as much
        if self._strategy.world.device.type == "cpu":
            free -= given_back_bytes()  # the next steps take it again, beside the copy
        small, tight = size < BACKGROUND_BYTES, 2 * size > free
        return self._strategy.world.any(not small) and not self._strategy.world.any(tight)

    def _publish(self, folder: Path, state: TrainState, random_states: Sequence[dict[str, Tensor]]) -> None:
        draft, world = draft_of(folder), self._strategy.world
        with writing(folder):
            save_file({f"{rank}.{kind}": tensor for rank, states in enumerate(random_states)
                       for kind, tensor in states.items()}, draft / f"random{SAFE}")
            write_json(draft / "state.json", state.as_json())
            write_text(draft / "config.yaml", self._config_yaml)
            sums = {file.name: sha256(file) for file in sorted(draft.iterdir())}
            write_json(draft / MANIFEST, {"step": state.step, "world_size": world.ranks,
                                          "strategy": self._strategy.name, "sha256": sums})
            publish_draft(folder)
            try:
                verify(folder)  # before it takes the place of another
            except RunFolderError as error:
                remove(folder)
                raise Unwritable(error.faults) from None
            for old in outdated(self._run_folder, state.step, self._keep):
                remove(old)


def _give_way() -> None:
    """Lowest priority for this thread, where threads have one of their own: all threads of a step on a CPU wait for the
    one whose core was taken."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _new_draft(run_folder: Path, folder: Path) -> None:
    refuse_vanished(run_folder)
    with writing(folder):
        open_draft(folder)


def _write_own(pieces: Sequence[Piece], path: Path) -> None:
    """Under its own name only when it is whole: the main process looks for it."""
    with writing(path.parent):
        part = path.with_suffix(".part")
        write_pieces(pieces, part)
        if part.exists():
            flush(part)
            part.rename(path)


def _appeared(files: Sequence[Path], given_up: threading.Event) -> bool:
    while not all(file.exists() for file in files):
        if given_up.wait(LOOKING_S):
            return False
    return True


def _refusal(future: Future[None]) -> str:
    """Why the disk refused; empty if it did not. Any other exception is a fault of ours, and raised."""
    error = future.exception()
    if error is None or isinstance(error, Unwritable):
        return str(error or "")
    raise error


def _outcome(running: Written, refusals: Sequence[str]) -> float:
    assert running.published is not None
    said = [*refusals, _refusal(running.published)]
    if any(said):
        raise Unwritable(Fault(kind="run_folder", message=next(filter(None, said))))
    return running.seconds[0]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states
