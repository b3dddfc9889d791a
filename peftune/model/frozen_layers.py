"""The layers below the first one that trains: what they give for an example never changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_layers import GradientCheckpointingLayer

from peftune.model.adapters import base_of
from peftune.model.packing import in_rows


class _Enough(Exception):
    """Ends a forward pass behind the last frozen layer."""


def frozen_beginning(model: Any) -> tuple[list[nn.Module], int]:
    """Leading layers without a weight that trains, and how many layers there are; none where the model has not exactly
    one stack of them."""
    stacks = [module for module in base_of(model).modules() if isinstance(module, nn.ModuleList) and len(module)
              and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)]
    if len(stacks) != 1:
        return [], 0
    return [*takewhile(lambda layer: not any(p.requires_grad for p in layer.parameters()), stacks[0])], len(stacks[0])


class FrozenLayers:
    """Leading layers whose result can be taken in a forward pass, or given to it in place of their work.

    Hidden states are [T, D]: the tokens of all sequences of a batch, end to end, without padding.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """`layers`: at least one; their forward methods are replaced."""
        self._given_TD: Tensor | None = None
        self._lengths: Sequence[int] = ()
        self._taken: Tensor | None = None
        self._taking = False
        for layer in layers[:-1]:
            layer.forward = partial(self._pass_on, layer.forward)
        layers[-1].forward = partial(self._end, layers[-1].forward)

    @contextlib.contextmanager
    def given(self, hidden_TD: Tensor, lengths: Sequence[int]) -> Iterator[None]:
        """Forward passes here start behind the layers. `lengths`: tokens of each sequence."""
        self._given_TD, self._lengths = hidden_TD, lengths
        try:
            yield
        finally:
            self._given_TD = None

    def taken(self, forward: Callable[[], Any], lengths: Sequence[int]) -> Tensor | None:
        """What the layers give in a forward pass, which ends there; None where it is no tensor of hidden states, or
        where a weight that trains takes part in it."""
        self._taking = True
        try:
            with torch.enable_grad(), contextlib.suppress(_Enough):
                forward()
        finally:
            self._taking, found = False, self._taken
            self._taken = None
        if found is None or found.requires_grad:
            return None
        if len(found) == 1:
            return found[0, : sum(lengths)]
        return torch.cat([row[:length] for row, length in zip(found, lengths, strict=True)])

    def _pass_on(self, plain: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(hidden, *args, **kwargs) if self._given_TD is None else hidden

    def _end(self, plain: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given_TD is not None:
            if len(hidden) > 1:
                return in_rows(self._given_TD, self._lengths)
            behind = hidden.shape[1] - len(self._given_TD)  # to pad by nothing would copy all of it
            return (pad(self._given_TD, (0, 0, 0, behind)) if behind else self._given_TD)[None]
        output = plain(hidden, *args, **kwargs)
        if self._taking:
            self._taken = output if isinstance(output, Tensor) else None
            raise _Enough
        return output
