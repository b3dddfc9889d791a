"""Fine-tune: accelerate launch peftune/train.py CONFIG.yaml [key=value ...]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # run as a script, python searches peftune/ itself first: search the folder above it instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from peftune.parallel.stop import Stop, listen

LISTENING = listen() if __name__ == "__main__" else None
"""A process of its own listens for signals before it imports anything that takes time."""

from peftune.config.load import load
from peftune.config.schema import RunConfig
from peftune.errors import EXIT_DONE, guarded, is_main
from peftune.imports import without_search_for_garbage


def main(arguments: list[str], stop: Stop | None = None) -> int:
    """Train, evaluate and save one run; return the exit code."""
    config = load(arguments)  # before torch: a fault in it is said at once
    with without_search_for_garbage():
        import peftune.build
        import peftune.report.page  # noqa: F401
    train(config, stop or Stop())
    return EXIT_DONE


def train(config: RunConfig, stop: Stop) -> dict[str, Any]:
    """Train, evaluate and save one run, or find that it is done; return its summary."""
    from peftune.build import build
    from peftune.loop.finish import finish
    from peftune.loop.fit import fit
    from peftune.report.closing import show_summary
    from peftune.report.page import PAGE, write_report

    with build(config, stop) as built:
        if built.run is None:
            if is_main() and not (Path(config.output_dir) / PAGE).exists():  # it was stopped, or the disk full, before
                write_report(Path(config.output_dir))
            show_summary(built.display, config.output_dir, built.summary or {}, done_before=True)
            return built.summary or {}
        stop.wait_for_steps(config.deadline_s)
        with built.display.training(built.run.steps, built.state.step):
            state = fit(built.run, built.state)
        state, summary = finish(built.run, state)
        if built.run.strategy.world.is_main:
            write_report(built.run.folder)
            show_summary(built.display, config.output_dir, summary)
    return summary


if __name__ == "__main__":
    sys.exit(guarded(lambda arguments: main(arguments, LISTENING), sys.argv[1:]))
