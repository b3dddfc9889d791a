"""`peftune launch slurm | kubernetes | hosts`: render a job, and send it if asked to."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from peftune.errors import EXIT_DONE, Fault, MachineError, say, writing_to
from peftune.parallel.names import STRATEGIES


def add_machines(train: argparse.ArgumentParser) -> None:
    """Give `peftune train` what it must be told where each machine runs a line of its own."""
    machines = train.add_argument_group("several machines", "the same line on each, another --node-rank; `peftune "
                                        "launch` writes them")
    machines.add_argument("--nodes", type=int, metavar="N", help="machines; --processes counts those of all")
    machines.add_argument("--node-rank", type=int, metavar="R", help="this machine's number, from 0")
    machines.add_argument("--main-node", metavar="HOST:PORT", help="the first machine, as the others reach it")
    machines.add_argument("--interface", metavar="NAME", help="network interface to the others")
    machines.add_argument("--log-dir", metavar="DIR", help="a file there for the output of each process")


def add_launch(commands: Any) -> None:
    """Add `peftune launch` with its places and their options to the commands."""
    text = "several machines: a Slurm or Kubernetes job, or ssh"
    places = commands.add_parser("launch", help=text, description=text).add_subparsers(required=True, metavar="PLACE")
    slurm = _place(places, "slurm", _slurm, "an sbatch script, one launcher a machine")
    slurm.add_argument("--time", metavar="D-HH:MM:SS",
                       help="limit, in any form of Slurm's; the run saves before it and is queued again")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--option", action="append", default=[], metavar="NAME[=VALUE]",
                       help="any other option of sbatch, such as cpus-per-task=64 or exclusive; may be repeated")
    slurm.add_argument("--notice", type=int, default=180, metavar="SECONDS",
                       help="how long before the limit the run is told to save, shorter than it; default 180")
    slurm.add_argument("--container", metavar="IMAGE", help="a .sif file for Apptainer, or an image for Pyxis")
    slurm.add_argument("--mount", action="append", default=[], metavar="PATH[:INSIDE]",
                       help="a folder that the container sees besides the current one; may be repeated")
    kubernetes = _place(places, "kubernetes", _kubernetes, "manifests for kubectl")
    kubernetes.add_argument("--image", help="of the containers; it has peftune; --submit needs it")
    kubernetes.add_argument("--claim", metavar="NAME[:PATH]", help="a PersistentVolumeClaim that all pods share; "
                            "mounted at PATH, default /workspace; --submit needs it")
    kubernetes.add_argument("--cpu", metavar="CORES", help="of each pod, such as 64; default: none are reserved")
    kubernetes.add_argument("--memory", metavar="SIZE", help="of each pod, such as 500Gi; default: none is reserved")
    kubernetes.add_argument("--kind", default="job", choices=("job", "jobset", "trainjob"),
                            help="plain Kubernetes, JobSet, or Kubeflow Trainer; default job")
    for sub in (slurm, kubernetes):
        sub.add_argument("--nodes", type=int, required=True, metavar="N", help="machines")
        sub.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="0: one process on the CPUs")
        sub.add_argument("--to", metavar="FILE", help="write it there instead of printing it")
        sub.add_argument("--submit", action="store_true", help="send it; needs sbatch or kubectl")
        sub.add_argument("--name", help="of the job; default: the config's file name")
    hosts = _place(places, "hosts", _hosts, "one launch line a machine, by ssh")
    hosts.add_argument("--hosts", required=True, metavar="A,B[:SLOTS]", help="machines, and the processes on each")
    hosts.add_argument("--port", type=int, default=29500, help="of the first machine, free; default 29500")
    hosts.add_argument("--ssh", default="ssh", metavar="COMMAND", help="gets a host and a line for its shell")
    hosts.add_argument("--print", action="store_true", dest="only_print", help="print the lines, start nothing")
    for sub in (slurm, kubernetes, hosts):
        sub.add_argument("--strategy", default="auto", help="auto (ddp) | " + " | ".join(STRATEGIES))
        sub.add_argument("--interface", metavar="NAME", help="network interface between the machines, such as ib0")
        sub.add_argument("--python", help="interpreter there; default: this one, python3 in a container")


def _place(places: Any, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    place: argparse.ArgumentParser = places.add_parser(name, help=text, description=text)
    place.set_defaults(command=command, takes_overrides=True)
    place.add_argument("config", metavar="CONFIG", help="key=value words after it override its settings")
    return place


def _slurm(parsed: argparse.Namespace) -> int:
    from peftune.cluster.job import check_job
    from peftune.cluster.slurm import sbatch_script

    job = check_job([parsed.config, *parsed.overrides], name=parsed.name, nodes=parsed.nodes,
                    gpus_per_node=parsed.gpus_per_node, strategy=parsed.strategy)
    options = {"time": parsed.time, "partition": parsed.partition, "account": parsed.account,
               "signal": f"B:USR1@{parsed.notice}"}
    for option in parsed.option:
        name, _, value = option.partition("=")
        options[name.lstrip("-")] = value
    settings = {"python": parsed.python or ("python3" if parsed.container else sys.executable),
                "container": parsed.container, "interface": parsed.interface}
    text = sbatch_script(job, options=options, settings=settings, mounts=parsed.mount)
    return _deliver(text, parsed, ["sbatch", "--parsable"])


def _kubernetes(parsed: argparse.Namespace) -> int:
    from peftune.cluster.job import check_job
    from peftune.cluster.kubernetes import NO_CLAIM, NO_IMAGE, as_yaml, manifests

    claim, _, mount = (parsed.claim or "").partition(":")
    stand_ins = {option: word for option, given, word in (
        ("--image", parsed.image, NO_IMAGE), ("--claim", claim, NO_CLAIM)) if not given}
    if stand_ins and parsed.submit:
        raise MachineError(Fault(kind="environment", message=f"--submit needs {' and '.join(stand_ins)}",
                                 mend="give them, or leave --submit out and fill them in by hand"))
    job = check_job([parsed.config, *parsed.overrides], name=parsed.name, nodes=parsed.nodes,
                    gpus_per_node=parsed.gpus_per_node, strategy=parsed.strategy)
    found = manifests(job, kind=parsed.kind, image=parsed.image or NO_IMAGE, claim=claim or NO_CLAIM,
                      mount=mount or "/workspace", python=parsed.python or "python3", interface=parsed.interface,
                      cpu=parsed.cpu, memory=parsed.memory)
    if stand_ins:
        say("to be filled in before it is sent: " + ", ".join(f"{word} by {name}" for name, word in stand_ins.items()))
    return _deliver(as_yaml(found), parsed, ["kubectl", "apply", "--filename", "-"])


def _hosts(parsed: argparse.Namespace) -> int:
    from peftune.cluster.hosts import launch_lines, parse_hosts, run_lines
    from peftune.cluster.job import check_job

    hosts, slots = parse_hosts(parsed.hosts)
    job = check_job([parsed.config, *parsed.overrides], name=None, nodes=len(hosts), gpus_per_node=slots,
                    strategy=parsed.strategy)
    lines = launch_lines(job, hosts, port=parsed.port, ssh=parsed.ssh, python=parsed.python or sys.executable,
                         interface=parsed.interface)
    for line in lines:
        print(line, file=sys.stdout if parsed.only_print else sys.stderr, flush=True)
    return EXIT_DONE if parsed.only_print else run_lines(lines, others_s=job.others_s)


def _deliver(text: str, parsed: argparse.Namespace, send: list[str]) -> int:
    """Write or print a job, and send it if that was asked for."""
    if parsed.submit and shutil.which(send[0]) is None:
        raise MachineError(Fault(kind="environment", message=f"--submit needs {send[0]}, which is not on the path",
                                 mend="submit where it is, or leave --submit out and take the file there"))
    if parsed.to:
        with writing_to(parsed.to, "--to"):
            Path(parsed.to).write_text(text, encoding="utf-8")
    elif not parsed.submit:
        print(text, end="")
    if not parsed.submit:
        return EXIT_DONE
    done = subprocess.run(send, input=text, text=True, check=False)
    if done.returncode:
        raise MachineError(Fault(kind="environment", message=f"{send[0]} refused the job (exit {done.returncode})",
                                 mend="read what it says above"))
    return EXIT_DONE
