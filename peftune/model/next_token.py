"""A causal language model whose forward pass ends in losses of the supervised tokens, without the logits of the others.

The losses are computed inside the forward pass: what wraps a model (DDP, ZeRO, FSDP2, PEFT) prepares its weights there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from peftune.errors import Fault, ModelError
from peftune.model.adapters import base_of
from peftune.model.outputs import logits_of
from peftune.model.proof import UNPROVEN, why_unproven
from peftune.numerics.linear_loss import head_cross_entropy
from peftune.numerics.losses import Predicted, sums_by_sequence, token_cross_entropy

PROOF_TOKENS = 24
RELATIVE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of a token's loss between the two roads, as a share of the largest one: matrices of other shapes
are multiplied in another order. Anything that a model does beside its output layer is far beyond it."""
SEEN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference, as a share of the largest logit, that later tokens make where a model cannot see them."""
NATS = "nats"


class EndsInLosses:
    """The forward method of a model, with one argument more.

    `predicted` makes it return {"nats": [N] float32} instead of logits. It begins on the plain road, which takes the
    losses off the whole logits; where `road_fault` finds none, `take_road` turns to the short one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.plain = self.__wrapped__ = model.forward  # inspect.signature, and so generate, look at __wrapped__
        self.rows: int | None = None
        """Tokens whose logits may exist at once; 0 for all of them; None on the plain road."""

    def __call__(self, *args: Any, predicted: Predicted | None = None, **kwargs: Any) -> Any:
        if predicted is None:
            return self.plain(*args, **kwargs)
        if self.rows is None:
            logits_NV = self.plain(*args, **kwargs)["logits"][predicted.rows_N, predicted.columns_N]
            return {NATS: token_cross_entropy(logits_NV, predicted.ids_N)}
        given = {name: value for name, value in kwargs.items() if value is not None}
        output = self._body()(*args, **given)
        head, hidden_BTD = partial(self._head, type(output)), output.last_hidden_state
        at_N = (predicted.rows_N + 1) * hidden_BTD.shape[1] + predicted.columns_N
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, at_N)
        if self.rows == 0:
            return {NATS: token_cross_entropy(head(hidden_ND), predicted.ids_N)}
        return {NATS: head_cross_entropy(head, hidden_ND, predicted.ids_N, rows=self.rows)}

    def _head(self, kind: type[ModelOutput], hidden_ND: Tensor) -> Tensor:
        """The model's own forward pass after its body: output layer, scaling, soft-capping, whatever it has.

        `kind`: what the body returns.
        """
        body, called = self._body(), False
        before = body.__dict__.get("forward")

        def given(*args: Any, **kwargs: Any) -> ModelOutput:
            nonlocal called
            called = True
            return kind(last_hidden_state=hidden_ND[None])

        body.forward = given
        try:
            logits: Tensor = self.plain(inputs_embeds=hidden_ND[None])["logits"]
        finally:
            if before is None:
                del body.forward
            else:
                body.forward = before
        if not called:  # a part of it has run in its place, over its own result
            raise RuntimeError(f"{type(self._model).__name__} does not call its body")
        return logits[0]

    def _body(self) -> Any:
        """What the output layer reads. Llama 4's body has another name than `base_model_prefix`; OPT and decoders of
        translation models hold theirs in a shell that they do not call."""
        base = self._model.base_model
        if base is self._model:
            base = next((part for part in base.children() if isinstance(part, PreTrainedModel)), base)
        return base.decoder if list(base._modules) == ["decoder"] else base


def end_in_losses(model: nn.Module) -> None:
    """Let a causal language model's forward pass take `predicted`. A copy of the model takes it too."""
    base: Any = base_of(model)
    base.forward = EndsInLosses(base)


def next_token_nats(model: nn.Module, inputs: dict[str, Any], predicted: Predicted) -> Tensor:
    """Cross-entropy of each supervised token, in nats, [N] float32. For models that `end_in_losses` has prepared."""
    nats: Tensor = model(**inputs, predicted=predicted)[NATS]
    return nats


def nats_by_sequence(
    model: nn.Module, inputs: dict[str, Any], predicted: Predicted, sequences: int
) -> Tensor:
    """[sequences] float32: nats of each sequence, summed over its supervised tokens.

    Args:
        model: prepared by `end_in_losses`.
        inputs: of its forward pass.
        predicted: the supervised tokens.
        sequences: their number.
    """
    return sums_by_sequence(next_token_nats(model, inputs, predicted), predicted.owners_N, sequences)


def take_road(model: nn.Module, rows: int | None) -> None:
    """Choose how losses are computed, see `EndsInLosses.rows`."""
    base_of(model).forward.rows = rows


def road_of(model: nn.Module) -> int | None:
    """The road chosen for a model."""
    rows: int | None = base_of(model).forward.rows
    return rows


@torch.no_grad()
def looks_ahead(
    model: nn.Module, *, vocabulary: int, dtype: torch.dtype, device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
) -> bool:
    """Whether logits change with the tokens after them: whoever sees the next token need not predict it.

    Arguments as for `road_fault`. Two rows of random tokens begin alike and go on differently. Logits of most of the
    equal tokens must differ: where bfloat16 rounds in another order, a router may send single ones to other experts.

    Raises:
        ModelError: logits are NaN.
    """
    ids = torch.randint(vocabulary, (2, PROOF_TOKENS), generator=torch.Generator().manual_seed(0))
    half = PROOF_TOKENS // 2
    ids[1, :half] = ids[0, :half]
    was_training = model.training
    model.eval()
    with autocast():
        logits = logits_of(model, {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)})
    model.train(was_training)
    first, second = logits[:, -PROOF_TOKENS:][:, :half].float()
    deviation = (first - second).abs().amax(1).median()
    if first.isnan().any():
        raise ModelError(Fault(
            kind="model", message="model.name_or_path: its logits are no numbers: weights are damaged, or too large "
            "for this type", mend="get the checkpoint again, or set model.dtype=float32"))
    return bool(deviation > SEEN[dtype] * first.abs().max())


@torch.no_grad()
def road_fault(
    model: nn.Module, *, vocabulary: int, dtype: torch.dtype, device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]], whole: bool,
) -> str | None:
    """Prove on random tokens that the short road gives the plain one's losses; else say what differs.

    Args:
        model: unwrapped, prepared by `end_in_losses`, with its adapter, on its device.
        vocabulary: ids are drawn below it.
        dtype: of the matrix products, which decides what rounding may do.
        device: of the model.
        autocast: precision of the forward pass.
        whole: take the logits of all supervised tokens at once.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, PROOF_TOKENS), generator=generator)
    rows, columns = torch.randint(PROOF_TOKENS - 1, (2, 2 * PROOF_TOKENS), generator=generator)
    asked = Predicted(*(part.to(device) for part in (
        rows % 2, columns - PROOF_TOKENS, ids[rows % 2, columns + 1], rows % 2)))
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
    was_training = model.training
    model.eval()
    try:
        with autocast():
            take_road(model, None)
            plain = next_token_nats(model, inputs, asked)
            take_road(model, 0 if whole else PROOF_TOKENS // 2)
            short = next_token_nats(model, inputs, asked)
    except UNPROVEN as error:
        return why_unproven(error)
    finally:
        take_road(model, None)
        model.train(was_training)
    deviation, largest = (short - plain).abs().max().item(), plain.abs().max().item()
    if not deviation <= RELATIVE_TOLERANCE[dtype] * largest:
        return f"its losses differ from the logits' by {deviation:.3g} (largest {largest:.3g})"
    return None
