"""Tokens that the model does not know yet: in the tokenizer, and as rows of the embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftune.config.schema import ModelConfig
from peftune.errors import Fault, ModelError


@dataclass(frozen=True, slots=True)
class NewRows:
    """Which rows of the embeddings the added tokens have."""

    ids: tuple[int, ...] = ()
    vocabulary: int = 0
    """Tokens of the tokenizer, the added ones among them."""
    known: int = 0
    """Tokens it had before."""


NO_ROWS = NewRows()
"""Of a run that adds no tokens."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Add the config's tokens to a tokenizer. Special ones are left out of decoded text.

    Raises:
        ModelError: the tokenizer has one already, or does not take it as one token.
    """
    names = (*config.added_tokens, *config.added_special_tokens)
    known = [name for name in names if name in tokenizer.get_vocab()] if names else []
    known += [name for name in names if names.count(name) > 1 and name not in known][:1]
    if known:
        raise _error(config, known[0], f"{', '.join(known)} is a token already",
                     "leave it out; adapter.trainable_token_indices trains rows of known tokens")
    for part, special in ((config.added_tokens, False), (config.added_special_tokens, True)):
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in part],
                             special_tokens=special)
    for name in names:
        if tokenizer.tokenize(name) != [name]:
            raise _error(config, name, f"the tokenizer does not take {name!r} as one token", "choose another name")


def new_rows(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> NewRows:
    """Ids of the config's tokens in a tokenizer that `add_tokens` has prepared."""
    names = [*config.added_tokens, *config.added_special_tokens]
    ids = sorted(tokenizer.convert_tokens_to_ids(names))
    return NewRows(tuple(ids), len(tokenizer), ids[0]) if ids else NO_ROWS


def _error(config: ModelConfig, name: str, message: str, mend: str) -> ModelError:
    key = "added_special_tokens" if name in config.added_special_tokens else "added_tokens"
    return ModelError(Fault(kind="model", message=f"model.{key}: {message}", mend=mend))


@torch.no_grad()
def resize(model: PreTrainedModel, rows: NewRows) -> None:
    """Give every added token a row that is the mean of the old ones, in input and output embeddings.

    Rows that the tables hold in reserve are used before the tables grow. Tied tables stay tied.

    Source: Hewitt, 2021, "Initializing new word embeddings for pretrained language models". The mean bounds how far the
    old tokens' probabilities move; transformers' own resizing draws from a normal distribution around it instead, which
    would make new rows depend on a random state.
    """
    if not rows.ids:
        return
    if rows.vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows.vocabulary, mean_resizing=False)
    for module in embedding_tables(model):
        table = module.weight.data
        table[list(rows.ids)] = table[:rows.known].float().mean(dim=0).to(table.dtype)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias[list(rows.ids)] = module.bias[:rows.known].mean()


def embedding_tables(model: PreTrainedModel) -> list[nn.Embedding | nn.Linear]:
    """Input embeddings, and output embeddings where they are a table of their own."""
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    return [into] if out is None or out.weight is into.weight else [into, out]


def token_rows(model: PreTrainedModel, rows: NewRows) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` for the added tokens: module name -> ids."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)].rpartition(".")[2]: list(rows.ids) for module in embedding_tables(model)}
