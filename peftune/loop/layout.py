"""Which layout a run trains in: packed wherever this very model is proven to keep examples apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from peftune.config.schema import ModelConfig
from peftune.data.examples import Example
from peftune.data.layouts import PADDED, Division, Layout, lay_out
from peftune.errors import ConfigError, Fault
from peftune.model.device_attention import kernel_fault
from peftune.model.division import WHOLE, division_fault, longest_row_matters
from peftune.model.load import first_position
from peftune.model.packing import use_packing
from peftune.model.packing_proof import RELATIVE_TOLERANCE, packing_fault
from peftune.model.padding import padding_fault
from peftune.model.precision import DTYPES
from peftune.numerics.few_shapes import takes_few_sizes
from peftune.numerics.losses import IGNORE
from peftune.parallel.world import World

TRIED_TOKENS = 1024
"""Longest sequence of the proof of packing where rows are divided: one device may not hold the longest of the data."""

SMALL_VOCABULARY = 128
"""Of models that read letters by their codes, and name no vocabulary."""


def choose_layout(
    wanted: Literal["auto", "padded", "packed"], config: ModelConfig, model: Any, model_config: PreTrainedConfig, *,
    pooled: bool, pad_id: int, longest: int, autocast: Callable[[], AbstractContextManager[None]], world: World,
    division: Division | None = None,
) -> tuple[Layout, str]:
    """The layout, and in a word why it is not the packed one, or what spoke against that once.

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
        division: who shares each row, if one device is not to hold it whole.

    Raises:
        ConfigError: packed or divided rows are asked for, and the model cannot do it.
    """
    vocabulary = model_config.get_text_config().to_dict().get("vocab_size", SMALL_VOCABULARY)
    proof = _Proof(model, pad_id, vocabulary, DTYPES[config.dtype], autocast, world, longest, pooled)
    rotating = longest_row_matters(model_config, longest)
    if wanted == "padded" or config.compiles_whole:
        why = "" if wanted == "padded" else " (model.compile=true needs rows of equal shape)"
        return _padded(config, proof, rotating, why)
    first = first_position(model_config)
    few_sizes = takes_few_sizes(DTYPES[config.dtype], on_cpu=world.device.type == "cpu", divided=division is not None)
    kind = use_packing(model, pooled=pooled, first_position=first, few_sizes=few_sizes)
    if rotating:
        why = rotating
    elif kind is None or (kind == "varlen" and division is not None):
        why = f"{model_config._attn_implementation} attention, a layer or the adapter cannot be told where examples end"
    else:
        layout, said = Layout(kind, first, few_sizes=few_sizes), ""
        if kind == "segments" and world.device.type == "cuda":
            packed, why = _proven(proof, replace(layout, at_once=True), division)
            if packed is not None:
                return packed, why
            said = f" (one sequence's attention after another: {why})"
        packed, why = _proven(proof, layout, division)
        if packed is not None:
            return packed, why + said
    _refuse_if_asked_for(wanted, why, divided=division is not None)
    return _padded(config, proof, rotating, f" ({why})")


def _proven(proof: _Proof, layout: Layout, division: Division | None) -> tuple[Layout | None, str]:
    """The layout, divided where that is asked for, and what spoke against it once; or None, and what speaks against it.
    """
    tried = proof.longest if division is None else min(proof.longest, TRIED_TOKENS)
    lengths = max(2, tried // 2), tried, 2, 2
    fault = once = proof.of_packing(layout, lengths)
    if once is not None:
        fault = proof.of_packing(layout, lengths)  # a model that reads across borders does so each time
    if fault is None and division is not None:
        layout = replace(layout, division=division)
        fault = proof.of_division(layout, lengths)
    if fault is not None:
        return None, fault
    return layout, "" if once is None else f" (only in the first of two proofs {once})"


def _refuse_if_asked_for(wanted: str, why: str, *, divided: bool) -> None:
    if divided:
        raise ConfigError(Fault(kind="config", message=f"sequences cannot be divided with this model: {why}",
                                mend=WHOLE))
    if wanted == "packed":
        raise ConfigError(Fault(kind="config", message=f"data.layout = 'packed': not with this model: {why}",
                                mend="data.layout=padded, or auto"))


def _padded(config: ModelConfig, proof: _Proof, rotating: str, why: str) -> tuple[Layout, str]:
    """Rows padded to the longest, if the model is proven to take no notice; else rows of equal length."""
    fault = rotating or (None if config.compiles_whole else proof.of_padding())
    if fault is None:
        return PADDED, why
    return replace(PADDED, equal_lengths=True), f"{why}, rows of equal length alone: {fault}"


@dataclass(frozen=True, slots=True)
class _Proof:
    """Random sequences through the very model, laid out in several ways."""

    model: Any
    pad_id: int
    vocabulary: int
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[None]]
    world: World
    longest: int
    """Tokens of the longest example."""
    pooled: bool

    def of_packing(self, layout: Layout, lengths: Sequence[int]) -> str | None:
        """See `packing_fault` and, where a kernel takes all sequences at once, `kernel_fault`; the main process's word
        counts."""
        fault = None
        if layout.at_once:
            fault = self.world.same(kernel_fault(self.model.config, self.world.device, self.dtype))
        return fault or self.world.same(packing_fault(
            self.model, lambda ids, packed: self._inputs(ids, layout if packed else PADDED), lengths=lengths,
            padding=self.pad_id, vocabulary=self.vocabulary, dtype=self.dtype, autocast=self.autocast,
            pooled=self.pooled))

    def of_padding(self) -> str | None:
        """See `padding_fault`; the main process's word counts."""
        return self.world.same(padding_fault(
            self.model, lambda ids: self._inputs(ids, PADDED), longest=self.longest, padding=self.pad_id,
            vocabulary=self.vocabulary, dtype=self.dtype, autocast=self.autocast, pooled=self.pooled))

    def of_division(self, layout: Layout, lengths: Sequence[int]) -> str | None:
        """See `division_fault`; one rank's fault is everybody's."""
        assert layout.division is not None
        whole = replace(layout, division=None)
        found = division_fault(
            self.model, lambda ids, divide: self._inputs(ids, layout if divide else whole),
            lengths=lengths, place=layout.division.place, vocabulary=self.vocabulary, padding=self.pad_id,
            tolerance=RELATIVE_TOLERANCE[self.dtype], autocast=self.autocast)
        return next((fault for fault in self.world.gather([found]) if fault is not None), None)

    def _inputs(self, sequences: Sequence[Sequence[int]], layout: Layout) -> dict[str, Any]:
        examples = [Example(ids, [IGNORE] * len(ids), 0, len(ids), {}) for ids in sequences]
        return lay_out(examples, range(len(examples)), layout=layout, pad_id=self.pad_id,
                       kind="class" if self.pooled else "token", width=0, device=self.world.device).inputs
