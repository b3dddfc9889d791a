"""A packed row divided among ranks: all of its tokens meet in attention, for a part of the heads on each rank.

Shape letters: H query heads, K key and value heads, D head size, T tokens of the row, N ranks that share it.

Source: Jacobs et al., 2023, arXiv:2309.14509 (Ulysses).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peftune.errors import ConfigError, Fault
from peftune.model.outputs import logits_of
from peftune.model.proof import random_sequences

Exchange = Callable[[Tensor], Tensor]
"""[N, ...], whose part i is for rank i -> [N, ...], whose part i came from rank i; differentiable."""
WHOLE_ROW_ROTATIONS = frozenset({"dynamic", "longrope"})
"""Rotary embeddings whose frequencies depend on the last position of a forward pass."""

WHOLE = "leave --sequence-parallel out, with model.gradient_checkpointing=true"
"""What is left for a model that cannot share its rows."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What SDPA reads of an attention layer, where a rank has other heads than the layer."""

    num_key_value_groups: int
    """Query heads to each key and value head."""
    is_causal: bool


def attend_whole(
    attend: Callable[..., Tensor], exchange: Exchange, ranks: int, module: Any, query: Tensor, key: Tensor,
    value: Tensor,
) -> Tensor:
    """Attention over all tokens of a row of which each rank has a part.

    Args:
        attend: layer (or `Heads`), query [1, H/N, T, D], key, value [1, K/N, T, D] -> [1, T, H/N, D].
        exchange: between the ranks.
        ranks: N, of which H is a multiple.
        module: the attention layer.
        query: [1, H, T/N, D].
        key, value: [1, K, T/N, D]. Where K is no multiple of N, heads are repeated until it is.

    Returns:
        [1, T/N, H, D].
    """
    heads, key_heads = query.shape[1], key.shape[1]
    copies = ranks // math.gcd(ranks, key_heads)
    if copies > 1:
        key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
        module = Heads(heads // (key_heads * copies), module.is_causal)
    output = attend(module, *_all_tokens(exchange, ranks, query, key, value))
    parts = output[0].unflatten(0, (ranks, -1))  # [N, T/N, H/N, D]
    return exchange(parts).transpose(0, 1).flatten(1, 2)[None]


def _all_tokens(exchange: Exchange, ranks: int, *states: Tensor) -> list[Tensor]:
    """[1, heads, T/N, D] each -> [1, heads/N, T, D] each. One exchange for all of them."""
    parts = [tensor[0].unflatten(0, (ranks, -1)) for tensor in states]  # [N, heads/N, T/N, D]
    flat = exchange(torch.cat([part.flatten(1) for part in parts], dim=1))
    pieces = flat.split([part[0].numel() for part in parts], dim=1)
    return [piece.view(part.shape).transpose(0, 1).flatten(1, 2)[None]
            for piece, part in zip(pieces, parts, strict=True)]


def refuse_undividable(config: PreTrainedConfig, ranks: int) -> None:
    """Raise ConfigError where a model cannot share its rows among so many ranks."""
    text = config.get_text_config()
    faults = []
    try:
        heads = int(text.num_attention_heads)
    except (AttributeError, TypeError):  # no attention, or other heads in each layer
        raise ConfigError(_fault("its layers have no common number of attention heads to share", WHOLE)) from None
    if heads % ranks:
        fitting = [str(n) for n in range(2, heads + 1) if heads % n == 0]
        faults.append(_fault(f"{heads} attention heads cannot be shared by {ranks} ranks",
                             f"--sequence-parallel {', '.join(fitting)}"))
    found = sorted(WHOLE_ROW_ROTATIONS & set(_rotations(text.to_dict())))
    if found:
        faults.append(_fault(f"its rotary embeddings ({found[0]}) depend on the length of the whole row", WHOLE))
    if faults:
        raise ConfigError(faults)


def longest_row_matters(config: PreTrainedConfig, longest: int) -> str:
    """Why a row's results depend on the longest one beside it, where rows are up to `longest` tokens; or nothing."""
    values = config.get_text_config().to_dict()
    kinds = sorted(WHOLE_ROW_ROTATIONS & set(_rotations(values)))
    limit = min(_originals(values), default=values.get("max_position_embeddings") or longest)
    if not kinds or longest <= limit:
        return ""
    return f"its rotary embeddings ({kinds[0]}) depend on the longest row of a micro-batch beyond {limit:,} tokens"


def _originals(value: Any) -> list[int]:
    if not isinstance(value, dict):
        return []
    own = value.get("original_max_position_embeddings")
    return ([own] if own else []) + [limit for part in value.values() for limit in _originals(part)]


def _rotations(value: Any) -> list[str]:
    """The kinds of rotary embeddings that a model's config names, which may do so for each kind of layer."""
    if not isinstance(value, dict):
        return []
    own = [str(value[key]) for key in ("rope_type", "type") if key in value]
    return own + [kind for part in value.values() for kind in _rotations(part)]


def _fault(message: str, mend: str) -> Fault:
    return Fault(kind="config", message=f"dividing sequences: {message}", mend=mend)


@torch.no_grad()
def division_fault(
    model: nn.Module, lay_out: Callable[[Sequence[Sequence[int]], bool], dict[str, Any]], *, lengths: Sequence[int],
    place: int, vocabulary: int, padding: int, tolerance: float,
    autocast: Callable[[], AbstractContextManager[None]],
) -> str | None:
    """Prove on random tokens that this rank's part of a divided row is computed as in the whole one; else say why not.

    All ranks call it. Models that mix tokens elsewhere than in attention do not pass.

    Args:
        model: prepared by `use_packing`, with its adapter.
        lay_out: sequences of ids, and whether to divide them -> inputs of the model.
        lengths: of the sequences to try.
        place: which part is this rank's.
        vocabulary: ids are drawn below it.
        padding: the one id that is not drawn.
        tolerance: largest difference as a share of the largest logit.
        autocast: precision of the forward pass.
    """
    sequences = random_sequences(lengths, vocabulary=vocabulary, padding=padding)
    was_training = model.training
    model.eval()
    with autocast():
        part, whole = (logits_of(model, lay_out(sequences, divide))[0] for divide in (True, False))
    model.train(was_training)
    begin = len(part) * place
    same = whole[begin : begin + len(part)]
    deviation = (part[: len(same)] - same).abs().max().item() if len(same) else 0.0
    largest = whole.abs().max().item()
    if not deviation <= tolerance * largest:
        return f"logits of a divided row differ from those of the whole one by {deviation:.3g} (largest {largest:.3g})"
    return None
