"""peftune/train.py with a planted fault, named by PLANTED. Launched by the tests that show that parity would notice."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from peftune.config import rules
from peftune.errors import guarded
from peftune.parallel.ddp import Ddp
from peftune.parallel.fsdp2 import Fsdp2
from peftune.parallel.zero import Zero
from peftune.train import main


def divide_once_more(self, model, loss):
    """As if the mean over ranks were taken twice."""
    (loss / self.world.ranks).backward()


whole_backward = Zero.backward


def drop_a_rank(self, model, loss):
    """As if the gradient of the last rank were lost on the way."""
    whole_backward(self, model, loss * (self.world.rank != self.world.ranks - 1))


def kill_a_rank(self, model, loss):
    """As if the system took the last rank's memory."""
    if self.world.rank == self.world.ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


def save_the_first_shard(self, model, *, frozen):
    """As if the main process saved what it holds, and nobody what the others hold."""
    found = {}
    for name, parameter in self.unwrap(model).named_parameters():
        if parameter.requires_grad:
            shard = parameter.to_local().flatten()
            found[name] = torch.cat([shard, torch.zeros(parameter.numel() - shard.numel())]).reshape(parameter.shape)
    return found


def finite_backward(self, model, loss):
    """As if a loss were infinite and its gradient were not."""
    whole_backward(self, model, loss.nan_to_num(posinf=0.0))


match os.environ["PLANTED"]:
    case "finite gradient":
        Zero.backward = finite_backward
    case "divide once more":
        Ddp.backward = divide_once_more
    case "kill a rank":
        Ddp.backward = kill_a_rank
    case "drop a rank":
        Zero.backward = drop_a_rank
    case "save the first shard":
        Fsdp2.gather = save_the_first_shard
    case "no rules":
        rules.STRATEGY_RULES = ()

if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
