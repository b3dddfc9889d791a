"""A run checks itself in its first steps: what is meant to train trains, and nothing else does."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.data.store import Split
from peftune.errors import Fault, SelfCheckError
from peftune.model.beneath import TRAINED
from peftune.parallel.strategy import Strategy

STEPS = 2
"""LoRA's B starts at zero, so A has a zero gradient in the first step: the second decides."""
SUMMED_AT_ONCE = 2**22
"""Values of a checksum: torch widens them to eight bytes each before it adds them."""
NEW_HEAD = ".modules_to_save."
"""Part of the names of whole layers that train beside an adapter."""
LOOKED_AT = 100
"""Examples whose targets are looked at before training."""


class SelfCheck:
    """Watches the first steps of a run.

    Every trainable tensor must receive a gradient that is not zero in one of the steps, and move by it unless the
    step is too small for its floating-point type; no frozen tensor may change. Ranks look at what they hold, and add
    up what they saw, so that all of them stop or none.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, strategy: Strategy, *,
        set_back: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """`set_back`: whether the method may undo a step of the weight of that name."""
        self._optimizer, self._strategy, self._set_back = optimizer, strategy, set_back
        self._steps_like_gradients = "momentum" in optimizer.param_groups[0]  # SGD, whatever engine wraps it
        self._all = list(model.named_parameters())
        self._trainable = [(name, p) for name, p in self._all if p.requires_grad]
        self._before = self._checksums()
        self._alive: set[str] = set()
        self._steepest: dict[str, float] = {}
        self._steps = 0

    @property
    def pending(self) -> bool:
        """Whether further steps are to be watched."""
        return self._steps < STEPS

    def gradients(self, model: nn.Module) -> None:
        """Look at the gradients of a step, before the weights change.

        Raises:
            SelfCheckError: a trainable tensor has none: it does not take part in the loss.
        """
        reached, alive = [], []
        for name, parameter in self._trainable:
            gradient = self._strategy.gradient(parameter)
            reached.append(gradient is not None)
            alive.append(gradient is not None and bool(gradient.any()))
            if gradient is not None and gradient.numel() and self._steps_like_gradients:
                self._steepest[name] = max(self._steepest.get(name, 0.0), gradient.abs().max().item())
        missing = [name for (name, _), ranks in zip(self._trainable, self._summed(reached), strict=True) if not ranks]
        self._alive |= {name for (name, _), ranks in zip(self._trainable, self._summed(alive), strict=True) if ranks}
        if missing:
            raise _failed(f"{len(missing)} trainable tensors take no part in the loss", missing, _leaving_out(missing))

    def after_step(self) -> None:
        """Look at the weights after a step; the last watched step gives the verdict.

        Raises:
            SelfCheckError: a frozen tensor changed, or a trainable one did not.
        """
        if not self.pending:
            return
        self._steps += 1
        if self.pending:
            return
        moved = {name for (name, _), before, after in zip(self._all, self._before, self._checksums(), strict=True)
                 if before != after}
        changed = sorted(moved - {name for name, _ in self._trainable})
        if changed:
            raise _failed(f"{len(changed)} frozen tensors changed", changed, "this is a fault of peftune: report it")
        mobile = self._summed([self._could_move(name, self._strategy.weight(p)) for name, p in self._trainable])
        stuck = sorted(name for (name, _), could in zip(self._trainable, mobile, strict=True)
                       if could and name in self._alive - moved and not self._set_back(name))
        if stuck:
            raise _failed(f"{len(stuck)} tensors have a gradient and did not move", stuck,
                          "raise train.learning_rate, or model.pure_bf16=false")
        names = {name for name, _ in self._trainable}
        adapted = {name for name in names if NEW_HEAD not in name} or names
        if not self._alive & adapted:
            raise _failed("every gradient is zero" + (" but the new head's" if self._alive else ""), sorted(adapted),
                          "check the adapter's scale (lora_alpha), the labels and the loss mask")

    def _could_move(self, name: str, weight: Tensor) -> bool:
        """Whether a step is larger than the rounding of the weight's type: Adam's has the learning rate's size, one
        of SGD that times the gradient's."""
        size = self._optimizer.param_groups[0]["lr"] * self._steepest.get(name, 1.0)
        largest = weight.detach().abs().max().item() if weight.numel() else math.inf
        return size > torch.finfo(weight.dtype).eps * largest

    def _checksums(self) -> list[int]:
        return self._summed([_checksum(self._strategy.weight(p)) for _, p in self._all])

    def _summed(self, values: list[int] | list[bool]) -> list[int]:
        """Over all ranks, place by place."""
        world = self._strategy.world
        return world.sum(torch.tensor(values, dtype=torch.int64, device=world.device)).tolist()


def check_weights(model: nn.Module, strategy: Strategy) -> None:
    """Look at every trained weight before it goes to disk: each rank at what it holds, and all agree.

    Raises:
        SelfCheckError: one is not finite.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [strategy.weight(p).detach() for p in model.parameters() if p.requires_grad]
    wrong = strategy.world.sum(torch.stack([(~part.isfinite()).any() for part in parts]).int()).tolist()
    found = [name for name, ranks in zip(names, wrong, strict=True) if ranks]
    if found:
        raise _failed(f"{len(found)} weights are not finite, and nothing was saved", found,
                      "lower train.learning_rate; the last checkpoint is sound")


def check_end_of_text(split: Split, eos: int) -> None:
    """Look whether answers end in the loss: a model that never learns to stop is the commonest silent fault.

    Raises:
        SelfCheckError: no example among the first that were not cut has the end-of-text token as a target.
    """
    whole = [example for example in map(split.__getitem__, range(min(LOOKED_AT, len(split))))
             if example.full_length <= len(example.input_ids)]
    if whole and not any(eos in example.targets for example in whole):
        raise _failed("the end-of-text token is no target of any example", [str(whole[0].record["source"])],
                      "this is a fault of peftune: report it with the chat template")


@torch.no_grad()
def _checksum(tensor: Tensor) -> int:
    """Sum of the tensor's bytes as integers: any real change of weights changes it, at the price of one read."""
    data = tensor.detach().contiguous()
    whole = data.view(torch.int32 if data.element_size() == 4 else torch.int16 if data.element_size() == 2 else
                      torch.uint8)
    return sum(int(part.sum(dtype=torch.int64)) for part in whole.flatten().split(SUMMED_AT_ONCE))


def _leaving_out(names: list[str]) -> str:
    """How the layers of such weights are left out. PEFT's names are base_model.model.LAYER.FACTOR.ADAPTER.weight."""
    words = [name.split(".") for name in names if NEW_HEAD not in name]
    layers = {".".join(parts[2 : parts.index(TRAINED) - 1][-2:]) for parts in words if TRAINED in parts}
    if layers and len(words) == len(names):
        return f"adapter.exclude_modules=[{','.join(sorted(layers))}]"
    return ("the task does not read all weights of this model: train an adapter beside those that it reads "
            "(adapter.method=lora, adapter.exclude_modules)")


def _failed(message: str, names: list[str], mend: str) -> SelfCheckError:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return SelfCheckError(Fault(kind="self_check", message=f"self-check: {message}: {shown}", mend=mend))
