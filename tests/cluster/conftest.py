"""Fixtures: a Slurm cluster of two nodes, and two hosts with a network between them, both on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SLURM_CONF = """
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=600
InactiveLimit=0
SwitchType=switch/none
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=16 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=16 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
"""For Slurm 22.05 as Debian 12 has it. CPUs exceed the machine's; requeued jobs wait for their credential to expire."""


def needs(*programs: str) -> None:
    """Skip unless this is root and the programs are there."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge iproute2")
    if os.geteuid() != 0:
        pytest.skip("needs root, for daemons and network namespaces")


def wait_for(happened: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Look often until it has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A running Slurm whose nodes are called node1 and node2; its folder."""
    needs("slurmctld", "slurmd", "munged", "sbatch", "unshare")
    if not Path("/sys/fs/cgroup").is_mount():
        pytest.skip("slurmd starts only where a file system is mounted on /sys/fs/cgroup")
    folder = tmp_path / "slurm"
    for name in ("state", "spool.node1", "spool.node2", "log"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    hosts = folder / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 node1 node2\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        run("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/log/munged.log",
            f"--seed-file={folder}/munged.seed")
        run("slurmctld", "-c")
        for node in ("node1", "node2"):
            run("unshare", "--mount", "sh", "-c", f"mount --bind {hosts} /etc/hosts && exec slurmd -N {node}")
        wait_for(lambda: output("sinfo", "-N", "-h", "-o", "%t").split() == ["idle", "idle"], "two idle nodes", 30)
        yield folder
    finally:
        subprocess.run(["scancel", "-u", "root"], check=False, capture_output=True)
        subprocess.run(["scontrol", "shutdown"], check=False, capture_output=True)
        pid = folder / "munged.pid"
        if pid.is_file():
            os.kill(int(pid.read_text()), 15)


def run(*words: str) -> None:
    """Run a command that must work; daemons go on behind it."""
    done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    assert done.returncode == 0, words


def output(*words: str) -> str:
    """What a command prints."""
    return subprocess.run(words, check=False, capture_output=True, text=True).stdout


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """Addresses of two hosts that reach each other alone, and a command in place of ssh."""
    needs("ip")
    first, second = "10.77.0.1", "10.77.0.2"
    up = [f"netns add {first}", f"netns add {second}", "link add pt77a type veth peer name pt77b"]
    for address, device in ((first, "pt77a"), (second, "pt77b")):
        up += [f"link set {device} netns {address}", f"-n {address} addr add {address}/24 dev {device}",
               f"-n {address} link set {device} up", f"-n {address} link set lo up"]
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nhost=$1; shift; exec ip netns exec "$host" sh -c "$*"\n')
    ssh.chmod(0o755)

    def remove() -> None:
        for address in (first, second):
            subprocess.run(["ip", "netns", "del", address], check=False, capture_output=True)

    remove()  # what a killed test has left
    try:
        for words in up:
            if subprocess.run(["ip", *words.split()], check=False, capture_output=True).returncode:
                pytest.skip(f"needs the right to make network namespaces: ip {words}")
        yield first, second, ssh
    finally:
        remove()
