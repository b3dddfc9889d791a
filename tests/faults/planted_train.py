"""peftune/train.py, of which rank PLANTED_RANK hangs or lacks memory, as PLANTED says, in a micro-batch of step 7."""

import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch

from peftune.errors import guarded
from peftune.loop import run
from peftune.train import main

lay_out = run.lay_out


def hang():
    time.sleep(3600)


def lack_memory():
    """Ask for 4 GiB where a limit leaves one."""
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, resource.RLIM_INFINITY))
    torch.zeros(2**30)


def lay_out_or_fail(*parts, **settings):
    doing = sys._getframe(1).f_locals["self"].strategy.world.progress.doing
    if doing == "in step 7" and os.environ.get("RANK", "0") == os.environ["PLANTED_RANK"]:
        {"hang": hang, "memory": lack_memory}[os.environ["PLANTED"]]()
    return lay_out(*parts, **settings)


run.lay_out = lay_out_or_fail

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
