"""Which layout a run trains in: packed wherever this very model is proven to keep examples apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from transformers import PreTrainedConfig

from peftune.config.schema import ModelConfig
from peftune.data.examples import Example
from peftune.data.layouts import PADDED, Layout, lay_out
from peftune.errors import ConfigError, Fault
from peftune.model.load import first_position
from peftune.model.packing import packing_fault, use_packing
from peftune.model.precision import DTYPES
from peftune.numerics.losses import IGNORE
from peftune.parallel.world import World


def choose_layout(
    wanted: Literal["auto", "padded", "packed"], config: ModelConfig, model: Any, model_config: PreTrainedConfig, *,
    pooled: bool, pad_id: int, longest: int, autocast: Callable[[], AbstractContextManager[None]], world: World,
) -> tuple[Layout, str]:
    """The layout, and in a word why it is not the packed one.

    Args:
        wanted: data.layout.
        config: the model section.
        model: unwrapped, with its adapter, on its device; prepared for packed batches.
        model_config: of the model.
        pooled: logits are one row a sequence.
        pad_id: padding token.
        longest: tokens of the longest example.
        autocast: precision of forward passes.
        world: all ranks must agree.

    Raises:
        ConfigError: packed is asked for, and the model cannot do it.
    """
    if wanted == "padded":
        return PADDED, ""
    first = first_position(model_config)
    kind = None if config.compile else use_packing(model, pooled=pooled, first_position=first)
    if kind is None:
        why = ("model.compile needs rows of equal shape" if config.compile else
               f"{model_config._attn_implementation} attention or the adapter cannot be told where examples end")
    else:
        layout = Layout(kind, first)

        def inputs(sequences: Sequence[Sequence[int]], packed: bool) -> dict[str, Any]:
            examples = [Example(ids, [IGNORE] * len(ids), 0, len(ids), {}) for ids in sequences]
            return lay_out(examples, range(len(examples)), layout=layout if packed else PADDED, pad_id=pad_id,
                           kind="class" if pooled else "token", width=0, device=world.device).inputs

        fault = world.same(packing_fault(
            model, inputs, lengths=(max(2, longest // 2), longest, 2, 2), padding=pad_id,
            vocabulary=model_config.get_text_config().vocab_size, dtype=DTYPES[config.dtype], autocast=autocast,
            pooled=pooled))
        if fault is None:
            return layout, ""
        why = fault
    if wanted == "packed":
        raise ConfigError(Fault(kind="config", message=f"data.layout = 'packed': not with this model: {why}",
                                mend="data.layout=padded, or auto"))
    return PADDED, f" ({why})"

