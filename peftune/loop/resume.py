"""Whether a run folder is new, can be continued, or is done; and that it is never written over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftune.errors import Fault, RunFolderError
from peftune.loop.checkpoint import all_checkpoints, differing_keys, is_checkpoint, newest_whole, run_of, verify
from peftune.loop.lock import LOCK, refuse_unmakeable
from peftune.loop.publish import draft_of, published, read_json, recover, write_text
from peftune.loop.state import TrainState

STEP = "step.txt"
"""File in best/ that names its step: a run that continues elsewhere cannot tell it from the weights."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    summary: dict[str, Any] | None = None
    """Of a run that is done already."""
    notes: tuple[str, ...] = ()
    new: bool = False
    """No run is in the folder."""

    def rows_kept(self, folder: Path, state: TrainState) -> int:
        """Rows of the run folder's metrics.jsonl that the state speaks of: none if the checkpoint is another run's."""
        own = self.checkpoint is not None and run_of(self.checkpoint) == folder.resolve()
        return state.rows if own else 0


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
    refuse_unusable(folder, resume)
    elsewhere = None if resume in ("auto", "never") else Path(resume)
    if elsewhere is not None and not _went_on(folder, resume):
        return _named_checkpoint(elsewhere, folder, config, data)
    if not (folder / "config.yaml").is_file():
        return Start(new=True)
    if resume == "never":
        raise _error(folder, "holds a run already, and resume=never", "choose another output_dir, or resume=auto")
    _same_run(folder / "config.yaml", config)
    _same_data(folder / "manifest.json", data, "choose another output_dir, or put the files back")
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
    if newest is None:
        return _without_own(folder, elsewhere, config, data)
    return Start(newest, notes=tuple(wrong))


def _went_on(folder: Path, resume: str) -> bool:
    """Whether the run in a folder has itself gone on from this checkpoint: given again, the command continues it."""
    began = resume_of(folder)
    return began not in (None, "auto", "never") and Path(str(began)) == Path(resume)


def resume_of(folder: Path) -> Any:
    """`resume` of the run in a folder; None where there is none."""
    saved = folder / "config.yaml"
    try:
        values = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else None
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None  # said where the config is compared
    return values.get("resume") if isinstance(values, dict) else None


def _without_own(folder: Path, elsewhere: Path | None, config: dict[str, Any], data: dict[str, Any]) -> Start:
    """Of a run that was stopped before its first checkpoint."""
    if elsewhere is not None:
        return _from_elsewhere(elsewhere, config, data)
    began = resume_of(folder)
    if began not in ("auto", "never"):
        raise _error(folder, f"holds a run that went on from {began}, and was stopped before a checkpoint of its own",
                     f"resume={began}, or another output_dir")
    return Start()


def refuse_begun(folder: Path, start: Start) -> None:
    """Raise RunFolderError if a run has begun in a folder that `find_start` found new. For who holds its lock now: that
    run has ended, or was stopped, while this one loaded its model."""
    if start.new and (folder / "config.yaml").is_file():
        raise _error(folder, "another run has begun there meanwhile", "start the same command again, which continues "
                     "that one if it is the same, or choose another output_dir")


def same_model(folder: Path, checkpoint: Path | None, content: dict[str, str]) -> dict[str, str]:
    """Compare what the model is read from, chat template and all, with what the run began with; return it.

    Args:
        folder: of the run.
        checkpoint: that the run continues from; None if it begins.
        content: hashes by file name.

    Raises:
        RunFolderError: something has changed: the run would be neither the old one nor a new one.
    """
    began = folder if checkpoint is None else run_of(checkpoint)
    manifest = began / "manifest.json"
    if manifest.is_file():
        try:
            other = json.loads(manifest.read_text(encoding="utf-8"))["model"].get("content", {})
            changed = sorted(name for name in other if content.get(name) != other[name])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _error(manifest, f"cannot be read: {error}", "choose another output_dir") from None
        if changed:
            raise _error(began, f"holds a run of another model. Changed since: {', '.join(changed)}",
                         "choose another output_dir, or put back what the run began with")
    return content


def starts(checkpoint: Path | None, step: int, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Where the steps were made that are in a run's weights: what each start ran on, and after which step, `now` last.

    Args:
        checkpoint: that the run continues from; None if it begins.
        step: of the checkpoint, else 0.
        now: versions, devices, strategy and processes of this start.

    Raises:
        RunFolderError: the manifest of the run so far cannot be read.
    """
    manifest = None if checkpoint is None else run_of(checkpoint) / "manifest.json"
    earlier = read_json(manifest).get("starts", []) if manifest is not None and manifest.is_file() else []
    return [*(start for start in earlier if start["after_step"] < step), {"after_step": step, **now}]


def write_step(folder: Path, step: int) -> None:
    """Say in a draft of best/ of which step it is."""
    write_text(folder / STEP, f"{step}\n")


def keep_best(state: TrainState, checkpoint: Path | None, folder: Path, warn: Callable[[str], None]) -> TrainState:
    """Have the best weights that a checkpoint's state speaks of in the run folder, or forget them.

    Args:
        state: of the checkpoint.
        checkpoint: that the run continues from; None if it begins.
        folder: of the run; another than the checkpoint's own gets a copy of best/ from there.
        warn: told if they are forgotten.

    Returns:
        The state, without a best step if its weights are not at hand: the next evaluation chooses anew.
    """
    if checkpoint is None or state.best_step is None or _is_of_step(folder / "best", state.best_step):
        return state
    old = run_of(checkpoint) / "best"
    if _is_of_step(old, state.best_step):
        with published(folder / "best") as draft:
            shutil.copytree(old, draft, dirs_exist_ok=True)
        return state
    warn(f"the best weights so far, of step {state.best_step}, are not in {old}: evaluations choose the best anew")
    return replace(state, best_value=None, best_step=None, evaluations_since_best=0)


def _is_of_step(best: Path, step: int) -> bool:
    """Whether a folder holds the weights of this step. A stop can leave those of a later one that is done again."""
    return (best / STEP).is_file() and (best / STEP).read_bytes() == f"{step}\n".encode()


def refuse_unusable(folder: Path, resume: str) -> None:
    """Raise RunFolderError where no run whatever could begin in `folder`, or go on from `resume`."""
    if not folder.is_dir():
        refuse_unmakeable(folder)
    if resume in ("auto", "never"):
        _refuse_other_files(folder)
        return
    if _went_on(folder, resume) and ((folder / "summary.json").is_file() or all_checkpoints(folder)):
        return  # that one is not needed any more
    if not Path(resume).is_dir():
        raise _error(Path(resume), "resume: no such checkpoint folder",
                     "resume=auto, or runs/x/checkpoints/step-000100")
    _refuse_other_folder(Path(resume))


def _named_checkpoint(checkpoint: Path, folder: Path, config: dict[str, Any], data: dict[str, Any]) -> Start:
    """A checkpoint of this run or another, into a new folder, or into its own if it is the newest there."""
    own = [path.resolve() for path in all_checkpoints(folder)]
    if _content(folder) and own[-1:] != [checkpoint.resolve()]:
        raise _error(folder, "holds files that continuing from this checkpoint would write over",
                     "choose another output_dir, or resume=auto for the newest checkpoint here")
    return replace(_from_elsewhere(checkpoint, config, data), new=not (folder / "config.yaml").is_file())


def _from_elsewhere(checkpoint: Path, config: dict[str, Any], data: dict[str, Any]) -> Start:
    verify(checkpoint)
    _same_run(checkpoint / "config.yaml", config)
    manifest = run_of(checkpoint) / "manifest.json"
    if checkpoint.resolve().parent.name != "checkpoints" or not manifest.is_file():
        return Start(checkpoint, notes=(
            f"{checkpoint} lies in no run folder with a manifest.json: whether its data were these is not known",))
    _same_data(manifest, data, "put the files back, or resume=auto, which begins anew in a new output_dir")
    return Start(checkpoint)


def _refuse_other_files(folder: Path) -> None:
    """Files of a folder that is no run's."""
    others = sorted(_content(folder))
    if others and not (folder / "config.yaml").is_file():
        raise _error(folder, f"holds other files ({', '.join(others[:5])}) and no run", "choose another output_dir")


def _content(folder: Path) -> set[str]:
    """Names in a folder, without what a run leaves there that was stopped before it had begun."""
    begun = {LOCK, draft_of(folder / "config.yaml").name}
    return {path.name for path in folder.iterdir()} - begun if folder.is_dir() else set()


def _refuse_other_folder(folder: Path) -> None:
    """A run folder, or any other that is no checkpoint, damaged or whole."""
    if is_checkpoint(folder):
        return
    if not (folder / "config.yaml").is_file():
        raise _error(folder, "resume: is no checkpoint: it has no state.json", "resume=auto, or "
                     "runs/x/checkpoints/step-000100")
    newest = "".join(f", or resume={path}" for path in all_checkpoints(folder)[-1:])
    raise _error(folder, "resume: is a run folder, no checkpoint", f"resume=auto with output_dir={folder}{newest}")


def _same_run(saved: Path, config: dict[str, Any]) -> None:
    try:
        other = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(saved, f"cannot be read: {error}", "choose another output_dir") from None
    differing = differing_keys(config, other if isinstance(other, dict) else {})
    if differing:
        raise _error(saved.parent, "holds a run with another config: " + "; ".join(differing[:8]),
                     "choose another output_dir, or set these keys back")


def _same_data(manifest: Path, data: dict[str, Any], mend: str) -> None:
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
                     mend)


def _error(folder: Path, message: str, mend: str) -> RunFolderError:
    return RunFolderError(Fault(kind="run_folder", file=str(folder), message=message, mend=mend))
