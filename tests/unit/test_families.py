"""Families of models that are built, named or stored otherwise than Llama: what trains of them, and what is saved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, MixtralConfig

from tests.conftest import summary

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
                         "eos_token_id": 1, "pad_token_id": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def family(decoder: str, tmp_path: Any) -> Callable[..., str]:
    """A config class and its fields -> the folder of such a model with random weights and the decoder's tokenizer."""

    def saved(config_class: Any, auto_class: Any = AutoModelForCausalLM, **fields: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(decoder)
        torch.manual_seed(0)
        folder = tmp_path / config_class.model_type
        auto_class.from_config(config_class(vocab_size=len(tokenizer), **fields)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return saved


@pytest.mark.parametrize(("config_class", "fields"), [(MixtralConfig, {**GROUPED, **ROUTED}), (GPTNeoXConfig, SIZES)])
def test_weights_that_are_stored_by_other_names_are_put_back_from_best(config_class, fields, family, converse, train):
    folder = train({**converse, "adapter": None, "model": {"name_or_path": family(config_class, **fields),
                                                           "dtype": "float32"},
                    "train": {"batch_size": 8, "max_steps": 4, "learning_rate": 1.0},
                    "evaluation": {"every_steps": 1, "max_new_tokens": 0}})
    result = summary(folder)
    rows = result["best"]["validation"], result["metrics"]["validation"]
    assert result["best_step"] < 4 and rows[0]["loss"] < rows[1]["loss"]
