"""Examples end to end in one row, with attention that cannot cross their borders.

Shape letters: H heads, T tokens, D head size, N sequences of equal length, L their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from peftune.model import device_attention
from peftune.model.adapters import base_of
from peftune.model.cpu_attention import attend, attends
from peftune.model.division import Exchange, attend_whole
from peftune.numerics.few_shapes import filled_up
from peftune.numerics.transfer import ends_of, to_device

SEGMENTS = "sdpa_segments"
"""Our name among transformers' attention functions: SDPA, on each sequence alone where lengths are given."""


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention within each sequence: transformers' SDPA, called once for each run of neighbouring sequences of equal
    length, or `attend` where that is faster; or once for all, where their borders lie on the device.

    Without `segment_lengths` it is transformers' SDPA itself. No score between two sequences is ever computed.

    Args:
        module: the attention layer.
        query, key, value: [1, H, T, D].
        attention_mask: of padded rows; not read where lengths are given.
        kwargs: segment_lengths, tokens of each sequence; segment_ends, int32 [N + 1] on the device (`ends_of`);
            exchange, where ranks share the row and hold equal parts of its tokens; sliding_window of this layer; what
            else SDPA takes.
    """
    lengths: Sequence[int] | None = kwargs.pop("segment_lengths", None)
    exchange: Exchange | None = kwargs.pop("exchange", None)
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def by_segments(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _by_segments(layer, query, key, value, lengths, kwargs)

    if exchange is None:
        return by_segments(module, query, key, value), None
    return attend_whole(by_segments, exchange, sum(lengths) // query.shape[2], module, query, key, value), None


def _by_segments(
    module: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], kwargs: dict[str, Any]
) -> Tensor:
    """[1, H, T, D] -> [1, T, H, D]; zeros behind the last sequence."""
    dropout, window = kwargs.get("dropout", 0.0), kwargs.get("sliding_window")
    ends = kwargs.pop("segment_ends", None)
    if ends is not None and device_attention.takes(query, key, value, sum(lengths), dropout=dropout):
        return device_attention.attend(query, key, value, ends, max(lengths), scale=kwargs.get("scaling"),
                                       causal=_is_causal(module, kwargs), window=window)
    if attends(query, key, value, max(lengths), dropout=dropout, window=window):
        scale = kwargs.get("scaling") or query.shape[3] ** -0.5
        return attend(query, key, value, lengths, scale=scale, causal=_is_causal(module, kwargs))
    parts = [list(part) for _, part in groupby(lengths)]
    tokens = [sum(part) for part in parts]
    behind = query.shape[2] - sum(tokens)
    # a split's gradient is written once; that of each slice is a whole tensor of zeros
    split = (x.split([*tokens, behind], dim=2)[:-1] for x in (query, key, value))
    outputs = [_run(module, q, k, v, part, kwargs) for part, q, k, v in zip(parts, *split, strict=True)]
    if behind:
        outputs.append(outputs[0].new_zeros(1, behind, *outputs[0].shape[2:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _run(
    module: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], kwargs: dict[str, Any]
) -> Tensor:
    """transformers' SDPA of sequences of equal length."""
    mask = _window_mask(module, lengths[0], kwargs, query.device)
    q, k, v = (_side_by_side(x, len(lengths)) for x in (query, key, value))
    output_NLHD: Tensor = sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
    return output_NLHD.reshape(1, sum(lengths), *output_NLHD.shape[2:])


def _side_by_side(values_1HTD: Tensor, count: int) -> Tensor:
    """[1, H, N L, D] -> [N, H, L, D]."""
    return values_1HTD.unflatten(2, (count, -1)).squeeze(0).transpose(0, 1)


def _window_mask(module: Any, length: int, kwargs: dict[str, Any], device: torch.device) -> Tensor | None:
    """[1, 1, L, L] bool where a layer sees only so many tokens around each one; None where all fit into that."""
    window = kwargs.get("sliding_window")
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance.abs() < window)[None, None] & ((distance >= 0) | (not _is_causal(module, kwargs)))[None, None]


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)  # set by each layer of its own


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, sdpa_mask)


def use_packing(
    model: PreTrainedModel | PeftModel, *, pooled: bool, first_position: int, few_sizes: bool = False
) -> Literal["segments", "varlen"] | None:
    """Prepare a model for packed batches; without them it computes what it did before.

    Args:
        model: changed in place.
        pooled: the output layer reads one token a sequence, from padded rows.
        first_position: position id of a sequence's first token.
        few_sizes: a row that is packed here is filled up, see `Layout.few_sizes`.

    Returns:
        segments or varlen; None where its attention, its other layers or its adapter cannot keep sequences apart.
    """
    base = base_of(model)
    if isinstance(model, PeftModel) and _adapts_by_row(model.active_peft_config):
        return None
    attention = base.config._attn_implementation
    if attention in ("sdpa", SEGMENTS):
        if base._is_stateful:
            return None  # layers that go on from token to token, such as Mamba's
        register()
        # towers of images and sound keep theirs: no text passes through them, and some know no other
        text = [name for name, part in vars(base.config).items() if part is base.config.get_text_config()]
        base.set_attn_implementation(dict.fromkeys(("", *text), SEGMENTS))
        if base.config.get_text_config()._attn_implementation != SEGMENTS:
            return None  # attention of the model's own, such as Falcon's
    elif not takes_cumulative_lengths(attention):
        return None
    if pooled:
        body = base.base_model
        body.register_forward_pre_hook(partial(_pack_inputs, first_position, few_sizes), with_kwargs=True)
        body.register_forward_hook(_pad_outputs, with_kwargs=True)
    return "varlen" if takes_cumulative_lengths(attention) else "segments"


def takes_cumulative_lengths(attention: str) -> bool:
    """Whether transformers tells an attention function where packed sequences end: FlashAttention, of all origins."""
    return is_flash_attention_requested(requested_attention_implementation=attention)


def _adapts_by_row(adapter: PeftConfig) -> bool:
    """Whether what is trained stands before each row, or begins where certain tokens come last in it (aLoRA)."""
    activated = isinstance(adapter, LoraConfig) and adapter.alora_invocation_tokens is not None
    return adapter.is_prompt_learning or activated


def _pack_inputs(
    first_position: int, few_sizes: bool, body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Padded rows with `segment_lengths` -> one row; output layers outside the body still see the padded ids."""
    if "segment_lengths" not in kwargs:
        return args, kwargs
    names = ("input_ids",) * len(args)
    packed = {**dict(zip(names, args, strict=True)), **kwargs}
    lengths = packed["segment_lengths"]
    device = packed.pop("attention_mask").device
    missing = filled_up(sum(lengths)) - sum(lengths) if few_sizes else 0
    at_T = to_device(_places_in_rows(lengths), device)
    for name in ("input_ids", "token_type_ids"):
        if packed.get(name) is not None:
            packed[name] = pad(packed[name].flatten().index_select(0, at_T)[None], (0, missing))
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(missing, np.int64)]) + first_position
    packed["position_ids"] = to_device(positions[None], device)
    if takes_cumulative_lengths(body.config._attn_implementation):
        ends = ends_of(lengths, device)
        packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths),
                   "max_length_k": max(lengths), "attention_mask": None}
    else:
        packed["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return (), packed


def _pad_outputs(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hidden states of a packed row -> a row a sequence, and the pooled output from them where the body has one.

    The same modules run whatever the number of sequences: ranks that gather weights for them must agree on that.
    """
    lengths = kwargs.get("segment_lengths")
    if lengths is None:
        return output
    output.last_hidden_state = in_rows(output.last_hidden_state[0], lengths)
    if output.get("pooler_output") is not None:
        output.pooler_output = _pooled(body, output.last_hidden_state)
    return output


def _pooled(body: Any, hidden_NLD: Tensor) -> Tensor:
    """As the body does it: ALBERT's pooler is a linear layer, BERT's takes the first token itself."""
    if "pooler_activation" in body._modules:
        return body.pooler_activation(body.pooler(hidden_NLD[:, 0]))
    pooled: Tensor = body.pooler(hidden_NLD)
    return pooled


def in_rows(hidden_TD: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T, D] -> [N, L, D], filled up with zeros, without what lies behind the sequences. Its gradient is one selection;
    pad_sequence's copies all for each."""
    at_T = to_device(_places_in_rows(lengths), hidden_TD.device)
    rows = hidden_TD.new_zeros(len(lengths) * max(lengths), hidden_TD.shape[1])
    return rows.index_copy(0, at_T, hidden_TD[: len(at_T)]).view(len(lengths), max(lengths), -1)


def _places_in_rows(lengths: Sequence[int]) -> np.ndarray:
    """[T] int64: where the tokens of sequences lie when each is a row filled up to the longest, rows end to end."""
    return np.flatnonzero(np.arange(max(lengths)) < np.asarray(lengths)[:, None])
