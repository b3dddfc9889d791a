"""A job on machines that ssh reaches: one launch line each, its output prefixed with the machine's name."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftune.cluster.job import Job
from peftune.errors import EXIT_DONE, EXIT_OUR_FAULT, EXIT_PREEMPTED, Fault, MachineError

TERM_S = 60.0
"""How long a machine that was told to end may take before its processes are killed, in seconds."""
END = "all() { echo $1; for one in $(pgrep -P $1); do all $one; done; }; kill -KILL $(all $(cat %s))"
"""Ends a launcher with its processes, which are in groups and sessions of their own."""


@dataclass(frozen=True, slots=True)
class Line:
    """What runs on one machine."""

    host: str
    command: tuple[str, ...]
    tell: tuple[str, ...]
    """Sends a signal to it, whose number takes the place of {}."""
    end: tuple[str, ...]
    """Kills it with all of its processes."""

    def __str__(self) -> str:
        return shlex.join(self.command)


def parse_hosts(text: str) -> tuple[list[str], int]:
    """`a,b:8` -> the names, and the processes on each: 1 unless a number follows.

    Raises:
        MachineError: a name twice, or machines with unequal numbers.
    """
    parts = [part.strip().partition(":") for part in text.split(",") if part.strip()]
    names = [name for name, _, _ in parts]
    slots = [number or "1" for _, _, number in parts]
    if not names or len(set(names)) < len(names) or not all(number.isdigit() and int(number) for number in slots):
        raise MachineError(Fault(kind="environment", message=f"--hosts {text}: not a list of different machines",
                                 mend="--hosts a,b or --hosts a:8,b:8, where 8 processes run on each"))
    if len(set(slots)) > 1:
        raise MachineError(Fault(kind="environment", message=f"--hosts {text}: unequal numbers of processes",
                                 mend="each machine must run as many as the others"))
    return names, int(slots[0])


def launch_lines(job: Job, hosts: Sequence[str], *, port: int, ssh: str, python: str, interface: str | None,
                 ) -> list[Line]:
    """One line a machine; the first machine is where the others find each other."""
    main = f"{hosts[0].rpartition('@')[2]}:{port}"
    lines = []
    for rank, host in enumerate(hosts):
        words = [python, "-m", "peftune", *job.train_words(job.arguments, rank=str(rank), main=main)]
        words += ["--interface", interface] if interface else []
        pid_file = f"~/.peftune-{port}-{rank}.pid"  # a home may be shared
        remote = f"cd {shlex.quote(str(Path.cwd()))} && echo $$ > {pid_file} && exec {shlex.join(words)}"
        reach = (*shlex.split(ssh), host)
        lines.append(Line(host, (*reach, remote), tell=(*reach, f"kill -{{}} $(cat {pid_file})"),
                          end=(*reach, END % pid_file)))
    return lines


def run_lines(lines: Sequence[Line], *, others_s: float) -> int:
    """Run all lines until they end; return 75 if one says so, else the first code that is not 0.

    Ctrl-C and the signals TERM and USR1 go to the launchers of all machines, whose processes agree where to stop.

    Args:
        lines: one a machine.
        others_s: how long the others may go on after one has failed, in seconds: their own watchdogs are to end them.
    """
    with _passing_signals(lines):
        running = [subprocess.Popen(line.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                    errors="replace", start_new_session=True) for line in lines]
        readers = [threading.Thread(target=_relay, args=(line.host, process), daemon=True)
                   for line, process in zip(lines, running)]
        for reader in readers:
            reader.start()
        _wait(lines, running, others_s)
        for reader in readers:
            reader.join(timeout=5)
    codes = [process.returncode for process in running]
    for line, code in zip(lines, codes):
        if code != EXIT_DONE:
            print(f"[{line.host}] ended with {code}", file=sys.stderr, flush=True)
    if EXIT_PREEMPTED in codes:
        return EXIT_PREEMPTED
    failed = [code for code in codes if code != EXIT_DONE]
    return EXIT_DONE if not failed else failed[0] if failed[0] > 0 else EXIT_OUR_FAULT


def _wait(lines: Sequence[Line], running: Sequence[subprocess.Popen[str]], others_s: float) -> None:
    """Until all have ended; if one fails, the others get `others_s` to notice, and TERM_S more to end as they are told.

    What a machine runs does not end with the ssh that has started it.
    """
    failed, told = None, False
    while left := [(line, process) for line, process in zip(lines, running) if process.poll() is None]:
        if failed is None and any(process.poll() for process in running):
            failed = time.monotonic()
        since = 0.0 if failed is None else time.monotonic() - failed
        if since > others_s and not told:
            told = True
            for line, _ in left:
                _tell(line, signal.SIGTERM)
        if since > others_s + TERM_S:
            for line, process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):  # a machine that is not reached any more
                    subprocess.run(line.end, timeout=20, check=False, start_new_session=True)
                process.kill()
        time.sleep(0.2)


def _tell(line: Line, number: int) -> None:
    subprocess.Popen([word.replace("{}", str(int(number))) for word in line.tell], start_new_session=True)


def _relay(host: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        print(f"[{host}] {text}", end="", flush=True)


@contextlib.contextmanager
def _passing_signals(lines: Sequence[Line]) -> Iterator[None]:
    def pass_on(number: int, frame: object) -> None:
        for line in lines:
            _tell(line, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
