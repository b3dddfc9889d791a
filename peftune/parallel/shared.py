"""Files that the machines of a run must have in common."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from peftune.errors import Fault, MachineError
from peftune.parallel.world import World

SEEN_S = 60.0
"""How long a file may take to appear on another machine, in seconds: network file systems remember absence."""


def check_output_is_shared(world: World, file: Path) -> None:
    """See that each machine reads what the main process has just written.

    Raises:
        MachineError: one does not, so pieces of checkpoints would be left behind on it.
    """
    written = world.on_main(file.read_bytes)

    def look() -> None:
        deadline = time.monotonic() + SEEN_S
        while not (file.is_file() and file.read_bytes() == written):
            if time.monotonic() > deadline:
                raise MachineError(Fault(
                    kind="environment", message=f"{socket.gethostname()} does not see {file}, which the first machine "
                    "has written", mend="output_dir=... on storage that all machines share"))
            time.sleep(0.5)

    world.on_each_machine(look)


def prepared_on_each_machine(world: World, prepare: Callable[[], Path], is_whole: Callable[[Path], bool]) -> Path:
    """The folder of prepared data: prepared once where the machines share a cache, else once on each.

    `is_whole`: whether a machine sees a folder with all that was prepared.

    Raises:
        MachineError: the machines have different data.
        PeftuneError: whatever `prepare` raises, on any of them.
    """
    path = world.on_main(prepare)
    path = world.on_each_machine(lambda: path if world.is_main or is_whole(path) else prepare())
    found = dict(reversed(world.gather([(path.name, socket.gethostname())])))  # the content's hash, a machine with it
    if len(found) > 1:
        raise MachineError(Fault(
            kind="environment", message=f"{' and '.join(found.values())} have different data, or different versions "
            "of peftune", mend="keep the data on storage that all machines share, and install one version"))
    return path
