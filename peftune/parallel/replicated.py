"""Where every rank holds the whole model: saving, restoring and clipping, the same for one process and for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftune.parallel.pieces import Piece, whole


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """torch's own, in one pass over all gradients."""
    reached = [parameter for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.clip_grad_norm_(reached, math.inf if max_norm is None else max_norm)


def apply_gradients(optimizer: Optimizer) -> None:
    """Where torch's optimizer holds what it changes: step, and drop the gradients."""
    optimizer.step()
    drop_gradients(optimizer)


def drop_gradients(optimizer: Optimizer) -> None:
    """Of every weight that the optimizer changes."""
    optimizer.zero_grad(set_to_none=True)


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state as it lies in memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into a model that holds its weights whole."""
    live = dict(model.named_parameters())
    for name, tensor in weights.items():
        live[name].copy_(tensor)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to the model's saved state and is no weight; every rank holds it whole."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in weights}


def whole_pieces(model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
    """Trained weights and the optimizer's state for each, whole."""
    for name, parameter in trained(model).items():
        yield whole(name, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                yield whole(f"{name}|{key}", torch.as_tensor(value))


@torch.no_grad()
def restore_whole(
    model: nn.Module, optimizer: Optimizer, read: Callable[[str], Tensor | None],
    place: Callable[[Tensor, nn.Parameter], Tensor] = lambda tensor, parameter: tensor,
) -> None:
    """Put saved tensors back, the optimizer's through its own loading (types, devices).

    Args:
        model: unwrapped.
        optimizer: over its trainable weights.
        read: name -> whole tensor.
        place: a whole tensor and the weight it belongs to -> the same as this rank is to hold it.

    Raises:
        KeyError: a trained weight is missing, or has another shape.
    """
    states: dict[int, dict[str, Tensor]] = {}
    for name, parameter in trained(model).items():
        parameter.copy_(place(saved_weight(name, parameter.shape, read), parameter))
        found = ((key, read(f"{name}|{key}")) for key in STATE_NAMES)
        states[id(parameter)] = {key: place(value, parameter) if value.shape == parameter.shape else value
                                 for key, value in found if value is not None}
    state_dict = optimizer.state_dict()
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state_dict["state"] = {i: states[id(p)] for i, p in enumerate(live) if states.get(id(p))}
    optimizer.load_state_dict(state_dict)
    _as_bitsandbytes_keeps_it(optimizer, states)


def _as_bitsandbytes_keeps_it(optimizer: Any, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
    """What its own loading leaves out: it counts steps with a number, which it rounds to the weights' type as it loads,
    and large states of its paged optimizers lie in memory that CUDA moves. `saved`: by the weight's id."""
    for parameter, state in optimizer.state.items():
        if "state1" not in state:
            continue
        state["step"] = int(saved[id(parameter)]["step"])
        for key in ("state1", "state2") if optimizer.is_paged else ():
            paged = optimizer.get_state_buffer(parameter, dtype=state[key].dtype)
            state[key] = paged.copy_(state[key])


STATE_NAMES = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer", "importance", "importance_uncertainty", "kept",
               "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")
"""What torch's AdamW and SGD keep for a weight, AdaLoRA's budget beside them, and bitsandbytes' 8-bit AdamW."""


def saved_weight(name: str, shape: torch.Size | tuple[int, ...], read: Callable[[str], Tensor | None]) -> Tensor:
    """A trained weight from a checkpoint. Raises KeyError where it is missing or has another shape."""
    tensor = read(name)
    if tensor is None or tuple(tensor.shape) != tuple(shape):
        found = "nothing" if tensor is None else list(tensor.shape)
        raise KeyError(f"{name}: {found} saved, {list(shape)} trained")
    return tensor
