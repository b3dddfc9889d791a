"""The cache of prepared data: folders that appear whole, and are looked at before they are trusted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peftune.disk import flush, sha256
from peftune.errors import Fault, MachineError, say

SUMS = "sha256.json"
"""File of each folder: the SHA-256 of every other one. Without it nothing there is used."""
DRAFT = ".draft-"
ABANDONED_S = 24 * 3600
"""A draft in the cache into which nothing was written for so long is nobody's."""


def root() -> Path:
    """Folder of prepared data: PEFTUNE_CACHE, or peftune/ under the user's cache folder."""
    own = os.environ.get("PEFTUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own).expanduser() if own else Path(base) / "peftune"


def is_whole(folder: Path) -> bool:
    """Whether a folder is there with all files as they were written: a lost one would leave rows out in silence."""
    try:
        expected = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return bool(expected == _sums(folder))
    except (OSError, ValueError):
        return False


def publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a draft beside `folder`, flush it and rename it: readers see all of it or nothing.

    A damaged folder of that name is said and deleted.

    Raises:
        MachineError: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_old_drafts(folder.parent)
        draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder.parent))
    except OSError as error:
        raise _refused(folder, error, "set PEFTUNE_CACHE to a folder that can be written") from None
    try:
        if folder.exists():
            say(f"{folder}: damaged data cache: its files are not as they were written; made again")
            folder.rename(draft / "damaged")
            shutil.rmtree(draft / "damaged")
        fill(draft)
        sums = _sums(draft)
        (draft / SUMS).write_text(json.dumps(sums), encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            flush(path)
        draft.rename(folder)
        flush(folder.parent)
    except OSError as error:
        if not is_whole(folder):  # else another process has published the same data first
            raise _refused(folder, error, "free disk space, or set PEFTUNE_CACHE to another folder") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sums(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != SUMS}


def _refused(folder: Path, error: OSError, mend: str) -> MachineError:
    return MachineError(Fault(kind="environment", file=str(folder.parent), message=f"the data cache: {error.strerror}",
                              mend=mend))


def _clear_old_drafts(folder: Path) -> None:
    """Delete what processes left behind that were killed long ago: a living one writes again and again."""
    for draft in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError):  # another process may publish it, or delete it too
            newest = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
            if time.time() - newest > ABANDONED_S:
                shutil.rmtree(draft, ignore_errors=True)
