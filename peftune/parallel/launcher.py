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
from peftune.parallel.host_memory import preload
from peftune.parallel.names import ASKED, ASKED_STRATEGY, SEQUENCES, SEQUENCES_ON, STRATEGIES
from peftune.parallel.network import interface_variables
from peftune.parallel.stop import SIGNALS, STARTED

STOP_FILE = "PEFTUNE_STOP_FILE"
"""Environment variable: a file whose appearance is a signal to stop, for places where a signal could come too early."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """This machine among the ones of a run."""

    count: int
    rank: int
    main_host: str
    """The first one."""
    main_port: str
    interface: str | None = None
    """The network interface between them; None looks for it."""


def choose_launch(
    strategy: str, processes: int | None, script_arguments: list[str], node: Node | None = None,
    log_dir: str | None = None, sequence_ranks: int = 1,
) -> Launch:
    """The launch line for a strategy: auto takes every GPU with ddp, or one process on the CPU.

    Args:
        strategy: one of STRATEGIES, or auto.
        processes: of all machines together; None takes one a GPU.
        script_arguments: the config and what overrides it.
        node: this machine, where there are several.
        log_dir: a folder for the output of each process.
        sequence_ranks: neighbouring processes that share each sequence.

    Raises:
        MachineError: a strategy this version lacks, one whose package is missing, no process or more than GPUs, or a
            number of them that leaves one of the groups that share sequences short.
    """
    gpus = _gpu_count()
    nodes = node.count if node else 1
    wanted = (1 if strategy == "single" else max(1, gpus) * nodes) if processes is None else processes
    if wanted < 1:
        raise _error(f"--processes {wanted}", "--processes 1, or more")
    strategy = strategy_for(strategy, wanted)
    if wanted % nodes:
        raise _error(f"{wanted} processes on {nodes} machines: each must run as many as the others",
                     f"--processes {wanted - wanted % nodes or nodes}")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise _error(f"--strategy {strategy} needs deepspeed, which is not installed",
                     'pip install "peftune[deepspeed]", or --strategy fsdp2')
    if gpus and wanted > gpus * nodes:
        raise _error(f"{wanted // nodes} processes, and {gpus} GPUs here", f"--processes {gpus * nodes}")
    if sequence_ranks < 1 or wanted % sequence_ranks:
        raise _error(f"--sequence-parallel {sequence_ranks}: {wanted} processes do not form groups of that size",
                     f"--processes {max(2, sequence_ranks)}, or a multiple of it")
    preset = "ddp-cpu" if strategy == "ddp" and not gpus else strategy
    command = ["--config_file", str(presets("accelerate") / f"{preset}.yaml"), "--num_processes", str(wanted)]
    variables = _variables(strategy, bool(gpus), sequence_ranks) | ({} if gpus else preload())
    if node:
        command += _among_machines(node, strategy)
        variables |= interface_variables(node.main_host, node.interface)
    elif strategy != "single":
        command += ["--main_process_port", str(free_port())]
    if log_dir is not None:
        rank = node.rank if node else 0
        command += ["--log_dir", str(Path(log_dir) / f"node-{rank}"), "--tee", "3", "--role", f"node {rank} process "]
        variables["PYTHONUNBUFFERED"] = "1"  # or the console would wait for a file's buffer
    script = Path(__file__).resolve().parents[1] / "train.py"
    return Launch((*command, str(script), *script_arguments), wanted, strategy, variables)


def node_of(nodes: int | None, rank: int | None, main: str | None, interface: str | None) -> Node | None:
    """What `peftune train` was told of its machine; None where there is one.

    Raises:
        MachineError: half of it is missing or wrong.
    """
    if (nodes or 1) == 1:
        return None
    assert nodes is not None
    host, _, port = (main or "").rpartition(":")
    if not (host and port.isdigit()):
        raise _error(f"--nodes {nodes} and --main-node {main}", "--main-node HOST:PORT: the first machine and a free "
                     "port of it")
    if rank is None or not 0 <= rank < nodes:
        raise _error(f"--node-rank {rank} of {nodes} machines", f"0 to {nodes - 1}, another on each")
    return Node(count=nodes, rank=rank, main_host=host, main_port=port, interface=interface)


def strategy_for(strategy: str, processes: int) -> str:
    """The strategy that `auto` means for so many processes, or the one that is named.

    Raises:
        MachineError: this version lacks it, or it is not one for this number of processes.
    """
    if strategy == "auto":
        return "ddp" if processes > 1 else "single"
    if strategy not in STRATEGIES:
        raise _error(f"--strategy {strategy}: this version has {', '.join(STRATEGIES)}", "--strategy auto")
    if strategy == "single" and processes > 1:
        raise _error(f"--strategy single runs one process, not {processes}", "--strategy ddp")
    if strategy == "ddp" and processes < 2:
        raise _error("--strategy ddp needs two processes or more", "--processes 2, or --strategy single")
    return strategy


def _among_machines(node: Node, strategy: str) -> list[str]:
    """What `accelerate launch` must know where each machine starts its own."""
    words = ["--num_machines", str(node.count), "--machine_rank", str(node.rank), "--main_process_ip",
             node.main_host, "--main_process_port", node.main_port, "--rdzv_backend", "static"]
    # its default starts the other machines itself, by pdsh
    return words + (["--deepspeed_multinode_launcher", "standard"] if strategy.startswith("zero") else [])


def _variables(strategy: str, on_gpus: bool, sequence_ranks: int) -> dict[str, str]:
    divide = {SEQUENCES_ON: "true", SEQUENCES: str(sequence_ranks)} if sequence_ranks > 1 else {}
    if on_gpus or strategy == "single":
        return divide
    # DeepSpeed would look for GPUs; accelerate would take DDP's processes to the GPUs of a machine that hides them
    kind = {"DS_ACCELERATOR": "cpu"} if strategy.startswith("zero") else {"ACCELERATE_USE_CPU": "true"}
    return kind | divide


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
        ended = _wait(passing.launcher, passing)
        if code.is_file():
            return int(code.read_text())
        if passing.told_launcher:
            say("stopped before the first step: nothing was to be saved. Start the same command again")
            return EXIT_PREEMPTED
        return ended if ended in (EXIT_DONE, EXIT_OUR_FAULT) else EXIT_OUR_FAULT


def _wait(launcher: subprocess.Popen[bytes], passing: _PassOn) -> int:
    """Until the launcher has ended; a file that asks for a stop is passed on as a signal would be."""
    asks = os.environ.get(STOP_FILE)
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return launcher.wait(None if asks is None else 0.5)
        if asks is not None and Path(asks).exists():
            passing(signal.SIGUSR1, None)
            asks = None


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


def presets(kind: str) -> Path:
    """A folder of launch/: in the checkout, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "launch" / kind, package / "launch" / kind):
        if folder.is_dir():
            return folder
    raise _error(f"the presets of launch/{kind} are missing", "install peftune again")


def _gpu_count() -> int:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return 0
    import torch

    return torch.cuda.device_count()


def free_port() -> int:
    """One that nobody on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _error(message: str, mend: str) -> MachineError:
    return MachineError(Fault(kind="environment", message=message, mend=mend))
