"""A job as an sbatch script: launch/slurm/train.sbatch with its lines filled in."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath

from peftune.cluster.job import Job
from peftune.errors import Fault, MachineError
from peftune.parallel.launcher import presets

NOTICES_S = (1, 65_535)
"""Least and most that sbatch takes, in seconds; 0 would warn when it is too late."""
NOTICE_S = 60
"""Slurm's, where --signal names none, in seconds."""
NO_LIMIT = ("UNLIMITED", "INFINITE")


def sbatch_script(job: Job, *, options: Mapping[str, str | None], settings: Mapping[str, str | None],
                  mounts: Sequence[str] = ()) -> str:
    """The script that runs `job`.

    Args:
        job: what is to run.
        options: of sbatch, by their long names without dashes; they come on top of the template's. None leaves what
            stands there, an empty text is an option without a value.
        settings: values of the template's variables besides those that the job decides; None leaves the template's.
        mounts: PATH or PATH:INSIDE of folders that a container sees besides the one where the job starts.

    Raises:
        MachineError: the run's output would be lost with its container, there is no container for a mount, the time
            limit is none of Slurm's, the warning would not come between the job's begin and its limit, or Slurm
            would write the log elsewhere than the job starts.
    """
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    start = options.get("chdir") or str(Path.cwd())
    if re.search(r"%\w|\\", start):
        raise MachineError(Fault(kind="environment", message=f"Slurm takes % and \\ in {start}, where the job's log is "
                                 "to lie, for a pattern", mend="start in another folder, or --option chdir=..."))
    _check_kept(job, start, pairs, settings.get("container"))
    script = (presets("slurm") / "train.sbatch").read_text(encoding="utf-8")
    wanted = {"job-name": job.name, "nodes": str(job.nodes), "chdir": str(Path.cwd())}
    if job.gpus_per_node:
        wanted["gpus-per-node"] = str(job.gpus_per_node)
    for name, value in {**wanted, **options}.items():
        if value is not None:
            script = _with_option(script, name, value)
    _check_times(_option(script, "time"), _option(script, "signal"))
    values = {"strategy": job.strategy, "processes_per_node": str(max(1, job.gpus_per_node)),
              "others_s": str(job.others_s), "mounts": ",".join(pairs), **settings}
    for name, value in values.items():
        if value is not None:
            script = _with_line(script, f"{name}=", shlex.quote(value))
    return _with_line(script, "arguments=", f"({shlex.join(job.arguments)})")


def _check_kept(job: Job, start: str, mounts: Sequence[str], container: str | None) -> None:
    if container is None:
        if mounts:
            raise MachineError(Fault(kind="environment", message="--mount without --container",
                                     mend="--container IMAGE too, or leave --mount out"))
        return
    seen = [start, *(mount.split(":")[1] for mount in mounts)]
    folder = PurePosixPath(normpath(PurePosixPath(start, job.config.output_dir)))  # an absolute one stays what it is
    if not any(folder.is_relative_to(one) for one in seen):
        raise MachineError(Fault(kind="environment", message=f"output_dir = {job.config.output_dir} lies outside "
                                 f"{', '.join(seen)}, which the container sees: it would be lost with the container",
                                 mend=f"--mount {folder.parent}, or an output_dir that lies there"))


def _check_times(time: str, signal: str) -> None:
    limit_s = _limit_s(time)
    given = re.search(r"@(-?[0-9]+)$", signal)
    notice_s = int(given[1]) if given else NOTICE_S
    if not NOTICES_S[0] <= notice_s <= NOTICES_S[1]:
        raise MachineError(Fault(kind="environment", message=f"--notice {notice_s}: Slurm cannot warn so many seconds "
                                 "before the limit", mend="from {} to {}".format(*NOTICES_S)))
    if notice_s >= limit_s:
        raise MachineError(Fault(
            kind="environment", message=f"--time {time} is {limit_s:,} s, --notice {notice_s}: the warning would be "
            "due no later than the job's begin", mend=f"a --time above {notice_s:,} s, or a --notice below {limit_s}, "
            "which must be longer than a checkpoint takes"))


def _limit_s(time: str) -> float:
    """Seconds after which Slurm ends a job: it rounds up to minutes, and 0 is no limit."""
    if time.upper() in NO_LIMIT:
        return math.inf
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", time):
        raise MachineError(Fault(kind="environment", message=f"--time {time}: no time that Slurm takes",
                                 mend="minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S, " + " or ".join(NO_LIMIT)))
    days, _, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    hours, minutes, seconds = [*([] if days or len(numbers) == 3 else [0]), *numbers, 0, 0][:3]
    return math.ceil((((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) / 60) * 60 or math.inf


def _option(script: str, name: str) -> str:
    found = re.search(rf"^#SBATCH --{name}=(.*)$", script, flags=re.M)
    return " ".join(shlex.split(found[1])) if found else ""


def _with_option(script: str, name: str, value: str) -> str:
    line = f"#SBATCH --{name}={_word(value)}" if value else f"#SBATCH --{name}"
    replaced, count = re.subn(rf"^#SBATCH --{re.escape(name)}(=.*)?$", lambda _: line, script, flags=re.M)
    if count:
        return replaced
    last = script.rindex("#SBATCH")
    end = script.index("\n", last)
    return f"{script[:end]}\n{line}{script[end:]}"


def _word(value: str) -> str:
    """As sbatch reads it: quoted as for a shell, but that a backslash escapes within quotes too."""
    return shlex.quote(value.replace("\\", "\\\\"))


def _with_line(script: str, start: str, value: str) -> str:
    """The script with another value, and the comment behind it gone."""
    replaced, count = re.subn(rf"^{re.escape(start)}.*$", lambda _: start + value, script, flags=re.M)
    assert count == 1, f"the template has {count} lines that begin with {start}"
    return replaced
