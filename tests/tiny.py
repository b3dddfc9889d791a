"""Tiny real models and made-up rows for the tests."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NOUNS = ("printer", "password", "invoice", "laptop", "badge", "mailbox", "screen", "licence", "router", "meeting")
GOOD = ("works again", "is fine now", "was replaced, thank you", "looks great", "is faster than ever")
BAD = ("is broken", "fails every morning", "was lost", "makes a terrible noise", "keeps asking me to wait")


def intent_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of very unequal length with a label that a small model can learn."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        good = rng.random() < 0.5
        parts = [f"the {rng.choice(NOUNS)} {rng.choice(GOOD if good else BAD)}" for _ in range(rng.randint(1, 5))]
        rows.append({"text": f"ticket {number}: " + " and ".join(parts), "label": "praise" if good else "complaint"})
    return rows


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one to three questions; answers of 1 to 30 words."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        messages = [{"role": "system", "content": "Answer briefly."}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            words = rng.randint(1, 4) if rng.random() < 0.6 else rng.randint(15, 30)
            messages += [{"role": "user", "content": f"question {number} about the {rng.choice(NOUNS)}?"},
                         {"role": "assistant", "content": " ".join(rng.choice(NOUNS) for _ in range(words))}]
        rows.append({"messages": messages})
    return rows


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences of 3 to 40 words in which things and states of two words are entities."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for _ in range(rng.randint(1, 8)):
            thing = rng.choice(NOUNS)
            words += ["the", thing] + (["is", "broken"] if rng.random() < 0.5 else ["works"])
            tags += ["O", "B-thing"] + (["B-state", "I-state"] if words[-1] == "broken" else ["O"])
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def question_rows(count: int, seed: int = 0, *, unanswerable: bool = False) -> list[dict[str, Any]]:
    """Contexts of 8 to 60 words; the answer is what was said of the thing that is asked for."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        things = rng.sample(NOUNS, rng.randint(2, 9))
        said = [rng.choice(GOOD + BAD) for _ in things]
        context = " and ".join(f"the {thing} {state}" for thing, state in zip(things, said, strict=True))
        asked = rng.randrange(len(things))
        start = context.index(f"the {things[asked]} ") + len(things[asked]) + 5
        answers = [{"text": said[asked], "answer_start": start}]
        thing = things[asked]
        if unanswerable and number % 3 == 2:
            thing, answers = next(noun for noun in NOUNS if noun not in things), []
        rows.append({"id": f"q{number}", "question": f"what about the {thing}?", "context": context,
                     "answers": answers})
    return rows


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions whose chosen answer is friendly and whose rejected one is not; of unequal length."""
    rng = random.Random(seed)
    return [{"prompt": f"question {number} about the {rng.choice(NOUNS)}?",
             "chosen": " " + " and ".join(rng.choice(GOOD) for _ in range(rng.randint(1, 4))),
             "rejected": " " + " and ".join(rng.choice(BAD) for _ in range(rng.randint(1, 4)))}
            for number in range(count)]


def _corpus() -> list[str]:
    texts = [row["text"] for row in intent_rows(200, seed=1)]
    return texts + [turn["content"] for row in chat_rows(100, seed=1) for turn in row["messages"]]


def _word_pieces(texts: list[str]) -> dict[str, int]:
    """The letters of these texts, at the beginning of a word and inside one, and the words seen five times or more.

    tokenizers' own trainer chooses and numbers pieces otherwise in each process, and every run's losses with them.
    """
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(word for word, count in words.items() if count >= 5 and len(word) > 1)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *frequent]
    return {piece: number for number, piece in enumerate(pieces)}


def save_decoder(folder: Path, *, texts: list[str] | None = None, vocab_size: int = 400, **changes: Any) -> str:
    """A byte-level BPE tokenizer whose padding token is its end-of-text token, and a Llama of two layers.

    Weights are drawn five times wider than Llama's, or a frozen output layer of width 32 could say nothing but that
    all tokens are about as likely, whatever an adapter learns below it.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts or _corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
                "initializer_range": 0.1, **changes}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=1,
                                 **settings)).save_pretrained(folder)
    return str(folder)


def save_encoder(folder: Path) -> str:
    """A WordPiece tokenizer and a BERT of two layers, with dropout in its config as real ones have it.

    Its weights are drawn ten times wider than BERT's: at 0.02 and a width of 32, embeddings and position drown the
    differences between texts, the output barely depends on the input, and a short training run only finds the class
    frequencies. New heads are drawn as BERT's are.
    """
    backend = Tokenizer(models.WordPiece(_word_pieces(_corpus()), unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, initializer_range=0.2,
    ))
    model.config.initializer_range = 0.02
    model.save_pretrained(folder)
    return str(folder)
