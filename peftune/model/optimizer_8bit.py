"""AdamW whose state is kept in 8 bits, by bitsandbytes.

Source: Dettmers et al., 2022, arXiv:2110.02861: blocks of 256 values share a scale. Weights of fewer than 4,096 values
keep their state in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from peftune.errors import Fault, MachineError
from peftune.model.quantize import require_bitsandbytes


def adamw_8bit(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], paged: bool) -> Optimizer:
    """The optimizer over torch's parameter groups.

    Args:
        groups: of torch's kind, each with its weight decay.
        lr: learning rate.
        betas: decay rates of the two moments.
        paged: large states live in memory that CUDA moves between GPU and host.

    Raises:
        MachineError: bitsandbytes is not installed, or `paged` is asked for weights on a CPU, where bitsandbytes would
            use the plain one instead.
    """
    name = "paged_adamw_8bit" if paged else "adamw_8bit"
    require_bitsandbytes(f"train.optimizer = {name!r}")
    parameters: list[torch.Tensor] = [p for group in groups for p in group["params"]]
    if paged and any(p.device.type == "cpu" for p in parameters):
        raise MachineError(Fault(kind="environment", message=f"train.optimizer = {name!r}: the weights are in host "
                                 "memory already: there are no pages to move", mend="train.optimizer=adamw_8bit"))
    import bitsandbytes

    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    optimizer: Optimizer = kind(groups, lr=lr, betas=betas)
    return optimizer
