"""Greedy text for many prompts: batches of like length, padded on the left, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from peftune.data.examples import Example
from peftune.data.layouts import lay_out
from peftune.model.adapters import base_of, learns_prompt, virtual_tokens_of
from peftune.model.division import longest_row_matters
from peftune.model.load import MOST_TOKENS, longest_input
from peftune.numerics.dealing import padded_groups

BUDGET_TOKENS = 8192
"""Padded prompt tokens plus new tokens of a batch."""


@torch.no_grad()
def generate_texts(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, prompts: Mapping[int, Sequence[int]], *,
    max_new_tokens: int, device: torch.device, autocast: Callable[[], AbstractContextManager[None]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    calls: Callable[[int], int] = lambda mine: mine, joint: bool = False, before: Callable[[], None] = lambda: None,
    token: Callable[[], None] = lambda: None, warn: Callable[[str], None] = lambda text: None,
    equal_lengths: bool = False,
) -> dict[int, str]:
    """Key -> prompt ids to key -> generated text, special tokens removed.

    Decoding is greedy, so that a score can be had again. It stops at the end-of-text token, or at any further
    stop token that the model's generation config names, and where the model has no further position. A prompt that
    takes all positions loses its beginning.

    Args:
        model: unwrapped, in evaluation mode.
        tokenizer: decodes, and names the padding and end-of-text tokens.
        prompts: ids by key.
        max_new_tokens: bound on the tokens of each answer.
        device: of the model.
        autocast: precision of the forward passes.
        progress: called with prompts done and their number.
        calls: a number of this rank -> the largest of all ranks'.
        joint: forward passes are joint: each batch goes on until every rank's is done.
        before: called before each batch, equally often on all ranks.
        token: called at each token of a batch.
        warn: told where the model's positions end too early.
        equal_lengths: rows of other lengths beside it change what the model says of a row.
    """
    limit = longest_input(base_of(model).config, MOST_TOKENS, virtual_tokens_of(model))
    prompts = {key: _kept(prompt, limit, max_new_tokens) for key, prompt in prompts.items()}
    keys, texts = list(prompts), dict[int, str]()
    lengths = [len(prompts[key]) for key in keys]
    rooms = [min(max_new_tokens, limit - length) for length in lengths]
    if calls(int(min(rooms, default=max_new_tokens) < max_new_tokens)):
        warn(f"the model has {limit:,} positions for text: prompts of more than {max(0, limit - max_new_tokens):,} "
             f"tokens get fewer than {max_new_tokens:,} new ones, and those of {limit:,} or more lose their beginning")
    whole = max(map(sum, zip(lengths, rooms, strict=True)), default=0)
    groups = _groups(lengths, rooms, by_length=equal_lengths or _reads_its_neighbours(model, whole))
    for room, group in _in_step(groups, calls):
        before()
        if not group and not joint:
            continue
        members, settings = [keys[i] for i in group], _settings(model, tokenizer, room)
        with autocast():
            rows = _continued(model, [prompts[key] for key in members], settings, device, joint=joint, token=token)
        texts |= {key: tokenizer.decode(row, skip_special_tokens=True).strip()
                  for key, row in zip(members, rows, strict=True)}
        progress(len(texts), len(keys))
    return texts


def _continued(
    model: GenerationMixin, prompts: Sequence[Sequence[int]], settings: GenerationConfig, device: torch.device, *,
    joint: bool, token: Callable[[], None],
) -> Tensor:
    """New ids of each prompt, [prompts, tokens]; where there is none, the model only takes part in joint passes."""
    examples = [Example(prompt, [0], 0, len(prompt), {}) for prompt in prompts]
    batch = lay_out(examples, range(len(prompts)), kind="class", width=0, pad_id=settings.pad_token_id, device=device,
                    left=True)
    ids: Tensor = model.generate(**batch.inputs, generation_config=settings, synced_gpus=joint,
                                 logits_processor=LogitsProcessorList([_EachToken(token)]))
    return ids[:len(prompts), batch.inputs["input_ids"].shape[1]:]


def _reads_its_neighbours(model: nn.Module, longest: int) -> bool:
    """Whether the answer to a prompt depends on longer ones beside it, in rows of up to `longest` tokens."""
    return learns_prompt(model) or bool(longest_row_matters(base_of(model).config, longest))


@torch.no_grad()
def stream_text(
    model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], *, max_new_tokens: int,
    temperature: float, device: torch.device, autocast: Callable[[], AbstractContextManager[None]],
    say: Callable[[str], None],
) -> None:
    """Continue one prompt, and say each piece of text as soon as no later token can change it.

    Args:
        model: unwrapped, in evaluation mode.
        tokenizer: decodes, and names the padding and end-of-text tokens.
        prompt: ids.
        max_new_tokens: bound on the tokens of the answer.
        temperature: 0 takes the likeliest token each time; else tokens are drawn, at this temperature.
        device: of the model.
        autocast: precision of the forward passes.
        say: called with the next piece.
    """
    settings = _settings(model, tokenizer, max_new_tokens)
    if temperature > 0:
        settings.update(do_sample=True, temperature=temperature)
    ids = torch.tensor([list(prompt)], device=device)
    with autocast():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                       streamer=_Spoken(tokenizer, say))


class _Spoken(BaseStreamer):
    """Says the text of the tokens that `generate` hands over, the prompt's left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] | None = None
        self._said = 0

    def put(self, value: Tensor) -> None:
        """Take the next token. The first call brings the prompt."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        self._tell(last=False)

    def end(self) -> None:
        """Say what was held back."""
        self._tell(last=True)

    def _tell(self, *, last: bool) -> None:
        text = self._tokenizer.decode(self._ids or [], skip_special_tokens=True)
        # half a letter is decoded as U+FFFD until its other bytes come; a blank may go when a sign follows it
        whole = text if last else text.rstrip("\ufffd ")
        self._say(whole[self._said:])
        self._said = max(self._said, len(whole))


class _EachToken(LogitsProcessor):
    """Calls something, and leaves the scores as they are."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._call()
        return scores


def _kept(prompt: Sequence[int], limit: int, max_new_tokens: int) -> Sequence[int]:
    """The prompt, or the end of one that leaves no position for an answer."""
    return prompt if len(prompt) < limit else prompt[-max(limit - max_new_tokens, (limit + 1) // 2):]


def _groups(lengths: Sequence[int], rooms: Sequence[int], *, by_length: bool) -> list[tuple[int, list[int]]]:
    """Batches of prompts, each after the number of its new tokens, the largest number first.

    Prompts with another room do not share a batch, so that what one is given does not depend on the others. With
    `by_length` those of another length do not either: a model may read the padding, or rotate by the longest row, or
    the padding would lie between a learned prompt and the text, and PEFT passes no positions that skip it.
    """
    kinds = [(room, length if by_length else 0) for room, length in zip(rooms, lengths, strict=True)]
    groups = padded_groups([length + room for length, room in zip(lengths, rooms, strict=True)], BUDGET_TOKENS)
    found = [(kind[0], [i for i in group if kinds[i] == kind])
             for group in groups for kind in dict.fromkeys(kinds[i] for i in group)]
    return sorted(found, key=lambda pair: -pair[0])


def _in_step(groups: Sequence[tuple[int, list[int]]], calls: Callable[[int], int]) -> list[tuple[int, list[int]]]:
    """The groups, and an empty one where only other ranks have one more with as many new tokens.

    In joint forward passes a rank goes on until the others are done, and must have positions for that.
    """
    rest, aligned = list(groups), []
    while room := calls(rest[0][0] if rest else 0):
        aligned.append((room, rest.pop(0)[1] if rest and rest[0][0] == room else []))
    return aligned


def _settings(model: GenerationMixin, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    stops = model.generation_config.eos_token_id
    several = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(dict.fromkeys([tokenizer.eos_token_id, *several])),
        bos_token_id=tokenizer.bos_token_id,
    )
