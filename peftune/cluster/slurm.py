"""A job as an sbatch script: launch/slurm/train.sbatch with its lines filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import normpath

from peftune.cluster.job import Job
from peftune.errors import Fault, MachineError
from peftune.parallel.launcher import presets


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
        MachineError: the run's output would be lost with its container, or there is no container for a mount.
    """
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in mounts]
    _check_kept(job, options.get("chdir") or str(Path.cwd()), pairs, settings.get("container"))
    script = (presets("slurm") / "train.sbatch").read_text(encoding="utf-8")
    wanted = {"job-name": job.name, "nodes": str(job.nodes), "chdir": str(Path.cwd())}
    if job.gpus_per_node:
        wanted["gpus-per-node"] = str(job.gpus_per_node)
    for name, value in {**wanted, **options}.items():
        if value is not None:
            script = _with_option(script, name, value)
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


def _with_option(script: str, name: str, value: str) -> str:
    line = f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"
    replaced, count = re.subn(rf"^#SBATCH --{re.escape(name)}(=.*)?$", lambda _: line, script, flags=re.M)
    if count:
        return replaced
    last = script.rindex("#SBATCH")
    end = script.index("\n", last)
    return f"{script[:end]}\n{line}{script[end:]}"


def _with_line(script: str, start: str, value: str) -> str:
    """The script with another value, and the comment behind it gone."""
    replaced, count = re.subn(rf"^{re.escape(start)}.*$", lambda _: start + value, script, flags=re.M)
    assert count == 1, f"the template has {count} lines that begin with {start}"
    return replaced
