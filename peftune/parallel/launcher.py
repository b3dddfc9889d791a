"""From `peftune train` to the `accelerate launch` line of this machine. Imports no torch until it must count GPUs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from peftune.errors import EXIT_CODE_FILE, EXIT_DONE, EXIT_OUR_FAULT, EXIT_PREEMPTED, Fault, MachineError, say
from peftune.parallel.names import ASKED, ASKED_STRATEGY, STRATEGIES
from peftune.parallel.stop import SIGNALS, STARTED


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line, and what it must start."""

    command: tuple[str, ...]
    processes: int
    strategy: str
    environment: dict[str, str]
    """Variables that the launchers on this machine need."""

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(["accelerate", "launch", *self.command])])


def choose_launch(strategy: str, processes: int | None, script_arguments: list[str]) -> Launch:
    """The launch line for a strategy: auto takes every GPU with ddp, or one process on the CPU.

    Raises:
        MachineError: a strategy this version lacks, one whose package is missing, or more processes than GPUs.
    """
    gpus = _gpu_count()
    wanted = processes or (1 if strategy == "single" else max(1, gpus))
    if strategy == "auto":
        strategy = "ddp" if wanted > 1 else "single"
    if strategy not in STRATEGIES:
        raise _error(f"--strategy {strategy}: this version has {', '.join(STRATEGIES)}", "--strategy auto")
    if strategy == "single" and wanted > 1:
        raise _error(f"--strategy single runs one process, not {wanted}", "--strategy ddp")
    if strategy == "ddp" and wanted < 2:
        raise _error("--strategy ddp needs two processes or more", "--processes 2, or --strategy single")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise _error(f"--strategy {strategy} needs deepspeed, which is not installed",
                     'pip install "peftune[deepspeed]", or --strategy fsdp2')
    if gpus and wanted > gpus:
        raise _error(f"{wanted} processes, and {gpus} GPUs here", f"--processes {gpus}")
    preset = "ddp-cpu" if strategy == "ddp" and not gpus else strategy
    command = ["--config_file", str(presets() / f"{preset}.yaml"), "--num_processes", str(wanted)]
    if strategy != "single":
        command += ["--main_process_port", str(_free_port())]
    script = Path(__file__).resolve().parents[1] / "train.py"
    return Launch((*command, str(script), *script_arguments), wanted, strategy, _variables(strategy, bool(gpus)))


def _variables(strategy: str, on_gpus: bool) -> dict[str, str]:
    if on_gpus or strategy == "single":
        return {}
    # DeepSpeed would look for GPUs; accelerate would take DDP's processes to the GPUs of a machine that hides them
    return {"DS_ACCELERATOR": "cpu"} if strategy.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}


def run(launch: Launch) -> int:
    """Run it and return the exit code that the training itself decided on.

    Launchers report any failure as 1 with a trace of their own. So the training leaves its code for an outcome
    that is not a crash in a file, and ends with 0. Signals go to the training processes and to them alone, in a process
    group of their own: launchers would end before them, or tell them twice.
    """
    with tempfile.TemporaryDirectory(prefix="peftune-") as folder:
        code = Path(folder) / "exit-code"
        environment = {**os.environ, **launch.environment, EXIT_CODE_FILE: str(code), STARTED: str(time.time()),
                       ASKED: str(launch.processes), ASKED_STRATEGY: launch.strategy}
        passing = _PassOn(code)
        for number in (*SIGNALS, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, passing)
        passing.launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launch.command], env=environment,
            process_group=0)
        ended = passing.launcher.wait()
        if code.is_file():
            return int(code.read_text())
        if passing.told_launcher:
            say("stopped before the first step: nothing was to be saved. Start the same command again")
            return EXIT_PREEMPTED
        return ended if ended in (EXIT_DONE, EXIT_OUR_FAULT) else EXIT_OUR_FAULT


@dataclass(slots=True)
class _PassOn:
    """Hands signals to the training processes, which say who they are by files beside that of the exit code."""

    code: Path
    launcher: subprocess.Popen[bytes] | None = None
    told_launcher: bool = False
    """No training process was there yet."""

    def __call__(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # the terminal is gone
            number = signal.SIGTERM
        listening = [int(file.suffix[1:]) for file in self.code.parent.glob(f"{self.code.name}.*")]
        for process in listening:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        if not listening:
            self.told_launcher = True
            if self.launcher is not None:
                os.killpg(self.launcher.pid, signal.SIGTERM)


def presets() -> Path:
    """The folder of accelerate presets: in the checkout, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "launch" / "accelerate", package / "launch" / "accelerate"):
        if folder.is_dir():
            return folder
    raise _error("the presets of launch/accelerate are missing", "install peftune again")


def _gpu_count() -> int:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return 0
    import torch

    return torch.cuda.device_count()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _error(message: str, mend: str) -> MachineError:
    return MachineError(Fault(kind="environment", message=message, mend=mend))
