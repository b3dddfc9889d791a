"""Whether a run folder is new, can be continued, or is done; and that it is never written over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import Fault, RunFolderError
from peftune.loop.checkpoint import all_checkpoints, differing_keys, newest_whole, verify
from peftune.loop.lock import LOCK
from peftune.loop.publish import recover


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    summary: dict[str, Any] | None = None
    """Of a run that is done already."""
    notes: tuple[str, ...] = ()


def find_start(folder: Path, config_yaml: str, resume: str, data: dict[str, Any]) -> Start:
    """Decide by the folder's content and `resume`. Writes nothing but the end of an interrupted replacement.

    Args:
        folder: output_dir.
        config_yaml: the resolved config of this run.
        resume: auto, never, or a checkpoint folder.
        data: fingerprints of this run's data.

    Raises:
        RunFolderError: the folder holds another run, or `resume` names no whole checkpoint of this one.
    """
    config = yaml.safe_load(config_yaml)
    if folder.exists() and not folder.is_dir():
        raise _error(folder, "output_dir is a file", "choose another output_dir")
    if resume not in ("auto", "never"):
        return _named_checkpoint(Path(resume), folder, config)
    if not (folder / "config.yaml").is_file():
        others = sorted({path.name for path in folder.iterdir()} - {LOCK}) if folder.is_dir() else []
        if others:
            raise _error(folder, f"holds other files ({', '.join(others[:5])}) and no run", "choose another output_dir")
        return Start()
    if resume == "never":
        raise _error(folder, "holds a run already, and resume=never", "choose another output_dir, or resume=auto")
    _same_run(folder / "config.yaml", config)
    _same_data(folder / "manifest.json", data)
    for name in ("best", "final"):
        recover(folder / name)
    summary = folder / "summary.json"
    if summary.is_file():
        try:
            return Start(summary=json.loads(summary.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise _error(summary, f"cannot be read: {error}", "delete it, and the run's end is done again") from None
    newest, wrong = newest_whole(folder)
    if newest is None and all_checkpoints(folder):
        raise _error(folder, "every checkpoint is damaged: " + "; ".join(wrong), "choose another output_dir")
    return Start(newest, notes=tuple(wrong))


def _named_checkpoint(checkpoint: Path, folder: Path, config: dict[str, Any]) -> Start:
    """A checkpoint of this run or another, into a new folder, or into its own if it is the newest there."""
    if not checkpoint.is_dir():
        raise _error(checkpoint, "resume: no such checkpoint folder", "resume=auto, or runs/x/checkpoints/step-000100")
    own = [path.resolve() for path in all_checkpoints(folder)]
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {LOCK} and own[-1:] != [checkpoint.resolve()]:
        raise _error(folder, "holds files that continuing from this checkpoint would write over",
                     "choose another output_dir, or resume=auto for the newest checkpoint here")
    verify(checkpoint)
    _same_run(checkpoint / "config.yaml", config)
    return Start(checkpoint)


def _same_run(saved: Path, config: dict[str, Any]) -> None:
    try:
        other = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(saved, f"cannot be read: {error}", "choose another output_dir") from None
    differing = differing_keys(config, other if isinstance(other, dict) else {})
    if differing:
        raise _error(saved.parent, "holds a run with another config: " + "; ".join(differing[:8]),
                     "choose another output_dir, or set these keys back")


def _same_data(manifest: Path, data: dict[str, Any]) -> None:
    """A changed file would change the batches, and the run would be neither the old one nor a new one."""
    if not manifest.is_file():
        return
    try:
        other = json.loads(manifest.read_text(encoding="utf-8"))["data"]["fingerprints"]
        changed = [name for name in other if other[name] != data.get(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _error(manifest, f"cannot be read: {error}", "choose another output_dir") from None
    if changed:
        raise _error(manifest.parent, f"holds a run on other data: the files of {', '.join(changed)} have changed",
                     "choose another output_dir, or put the files back")


def _error(folder: Path, message: str, mend: str) -> RunFolderError:
    return RunFolderError(Fault(kind="run_folder", file=str(folder), message=message, mend=mend))
