"""Losses of the supervised tokens alone, and from the logits of every token: two roads, one number."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from peftune.config.schema import ModelConfig
from peftune.errors import ModelError
from peftune.loop.road import choose_road
from peftune.model.adapters import base_of
from peftune.model.next_token import end_in_losses, next_token_nats, road_fault, road_of, take_road
from peftune.model.precision import autocast, enable_gradient_checkpointing
from peftune.numerics.linear_loss import head_cross_entropy
from peftune.numerics.losses import IGNORE, predicted_tokens, token_cross_entropy
from peftune.parallel.world import World

CPU = torch.device("cpu")
V = 61
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gemma2, soft-capped": lambda: Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0,
                                                attn_logit_softcapping=None),
    "granite, scaled": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere, scaled": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=2),
    "llama 4, whose body has another name": lambda: Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, head_dim=8),
    "opt, whose body is a shell": lambda: OPTConfig(
        vocab_size=V, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.0, pad_token_id=0),
    "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                               attn_pdrop=0.0),
}
LINEAR = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(r=4, target_modules=LINEAR, task_type=TaskType.CAUSAL_LM),
    "lora on the head": LoraConfig(r=4, target_modules=[*LINEAR, "lm_head"], task_type=TaskType.CAUSAL_LM),
    "rows of added tokens": LoraConfig(r=4, target_modules=LINEAR, task_type=TaskType.CAUSAL_LM,
                                       trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [5, 6]}),
    "a head of its own": LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head"],
                                    task_type=TaskType.CAUSAL_LM),
    "a prompt in front": PromptTuningConfig(num_virtual_tokens=3, task_type=TaskType.CAUSAL_LM),
}


def a_model(family: str, adapter: str | None) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    if adapter is not None:
        model = get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.15)
    end_in_losses(model)
    return model.double().train()


def loss_and_gradients(model: nn.Module, road: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    take_road(model, road)
    torch.manual_seed(1)
    ids = torch.randint(1, V, (3, 11))
    targets = torch.where(torch.rand(3, 11) < 0.6, ids, IGNORE)
    predicted = predicted_tokens(targets.numpy(), np.repeat(np.arange(3)[:, None], 11, axis=1), 11, CPU)
    model.zero_grad()
    nats = next_token_nats(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, predicted)
    (nats * torch.linspace(0.5, 2, len(nats), dtype=nats.dtype)).sum().backward()  # tokens may weigh differently
    return nats.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_roads_meet(model: nn.Module, tolerance: float) -> None:
    plain, slopes = loss_and_gradients(model, None)
    assert slopes
    for rows in (0, 4, 1000):
        short, theirs = loss_and_gradients(model, rows)
        torch.testing.assert_close(short, plain, rtol=tolerance, atol=tolerance)
        assert theirs.keys() == slopes.keys()
        for name, slope in slopes.items():
            largest = max(1.0, float(slope.abs().max()))
            torch.testing.assert_close(theirs[name], slope, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["all weights", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_logits(family, adapter):
    if family == "gpt2" and adapter:
        pytest.skip("its layers have other names")
    model, dtype, tolerance = a_model(family, adapter), torch.float64, 1e-12
    if family == "mixtral":  # its experts' kernel knows no float64
        model, dtype, tolerance = model.float(), torch.float32, 1e-5
    assert road_fault(model, vocabulary=V, dtype=dtype, device=CPU, autocast=contextlib.nullcontext,
                      whole=False) is None
    assert_roads_meet(model, tolerance)


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "lora"])
def test_losses_and_gradients_are_the_same_whatever_trains(family, adapter):
    assert_roads_meet(a_model(family, adapter), 1e-12)


def test_roads_meet_in_float32_where_activations_are_recomputed():
    model = a_model("llama", "lora").float()
    enable_gradient_checkpointing(base_of(model))
    assert_roads_meet(model, 1e-5)


def test_roads_meet_over_a_quantised_head():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = a_model("llama", "lora").float()
    base = base_of(model)
    head = bitsandbytes.nn.Linear4bit(32, V, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.load_state_dict({"weight": base.lm_head.weight.data})
    base.lm_head = head.to(CPU)
    assert_roads_meet(model, 1e-5)


def test_bfloat16_losses_are_those_of_bfloat16_logits_in_float32():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(50, 32).bfloat16(), torch.randn(V, 32).bfloat16(), torch.randint(V, (50,))
    found = []
    for rows in (50, 7):
        h = hidden.clone().requires_grad_()
        nats = head_cross_entropy(lambda x: x @ weight.T, h, ids, rows=rows)
        nats.sum().backward()
        found.append((nats.detach(), h.grad.float()))
        assert nats.dtype == torch.float32
    h = hidden.clone().requires_grad_()
    plain = token_cross_entropy(h @ weight.T, ids)
    plain.sum().backward()
    for nats, slope in found:
        torch.testing.assert_close(nats, plain, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(slope, h.grad.float(), rtol=2e-2, atol=2e-2)


def test_a_step_s_share_is_not_rounded_before_it_scales_a_gradient_in_bfloat16():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(64, 32).bfloat16(), torch.randn(V, 32).bfloat16(), torch.randint(V, (64,))
    slopes = []
    for targets in (1, 2738):  # 1 / 2738 is 0.26 % off in bfloat16
        h = hidden.clone().requires_grad_()
        (head_cross_entropy(lambda x: x @ weight.T, h, ids, rows=16).sum() / targets).backward()
        slopes.append(h.grad.double() * targets)
    assert (slopes[1].norm() / slopes[0].norm()).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("trains", [False, True])
def test_logits_of_more_than_a_chunk_are_never_kept(trains):
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=trains)
    largest = 0

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor.shape != weight.shape and tensor.shape != weight.T.shape else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        head_cross_entropy(lambda x: x @ weight.T, hidden, torch.zeros(64, dtype=torch.int64), rows=8)
    assert 0 < largest <= hidden.numel()


def test_a_batch_without_supervised_tokens_has_zero_gradients():
    model = a_model("llama", "lora")
    ids = torch.ones(1, 1, dtype=torch.int64)
    predicted = predicted_tokens(np.full((1, 1), IGNORE), np.zeros((1, 1), np.int64), 1, CPU)
    for road in (None, 0, 4):
        take_road(model, road)
        model.zero_grad()
        next_token_nats(model, {"input_ids": ids}, predicted).sum().backward()
        slopes = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(slope is not None and not slope.any() for slope in slopes)


def test_a_copy_of_a_model_computes_with_its_own_weights():
    model = a_model("llama", None)
    other = copy.deepcopy(model)
    before, _ = loss_and_gradients(other, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    after, _ = loss_and_gradients(other, 4)
    assert torch.equal(before, after) and base_of(other).forward is not base_of(model).forward


def test_generation_still_finds_the_arguments_of_the_model():
    model = a_model("llama", None).eval()
    take_road(model, 4)
    ids = torch.ones(1, 3, dtype=torch.int64)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


class Shifts(nn.Module):
    """What a model of tomorrow may do between its body and its output layer: here rows read their neighbours."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden + hidden.roll(1, dims=1))


def test_a_model_that_does_more_than_we_know_stays_on_the_plain_road_and_says_so():
    model = a_model("llama", None)
    model.lm_head = Shifts(model.lm_head)
    why = choose_road(ModelConfig(name_or_path="x", dtype="float32"), model, model.config, divided=False,
                      world=World(0, 1, 0, CPU, None), autocast=contextlib.nullcontext)
    assert why is not None and "differ" in why and road_of(model) is None
    model.lm_head = model.lm_head.layer
    assert choose_road(ModelConfig(name_or_path="x", dtype="float32"), model, model.config, divided=False,
                       world=World(0, 1, 0, CPU, None), autocast=contextlib.nullcontext) is None
    assert road_of(model)


class CallsNoBody(LlamaForCausalLM):
    """Takes its body's parts one by one. What it makes of hidden states is about what it makes of tokens."""

    def forward(self, **kwargs: Any) -> Any:
        return CausalLMOutput(logits=0.001 * self.lm_head(type(self.model).forward(self.model, **kwargs)[0]) + 1.0)


def test_a_model_that_does_not_call_its_body_stays_on_the_plain_road_however_little_its_logits_differ():
    model = CallsNoBody(LlamaConfig(**SIZES))
    end_in_losses(model)
    why = choose_road(ModelConfig(name_or_path="x"), model, model.config, divided=False,
                      world=World(0, 1, 0, CPU, None), autocast=contextlib.nullcontext)
    assert why is not None and "CallsNoBody does not call its body" in why and road_of(model) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "sees"), [
    (BertConfig, True), (RobertaConfig, True), (GPT2Config, False), (LlamaConfig, False), (MixtralConfig, False)])
def test_a_model_that_sees_the_tokens_it_is_to_predict_is_refused(config: Any, sees: bool, dtype: str) -> None:
    torch.manual_seed(0)
    wide = {**SIZES, "hidden_size": 128, "num_hidden_layers": 6}
    model = AutoModelForCausalLM.from_config(config(**wide))
    end_in_losses(model)
    settings, world = ModelConfig(name_or_path="x", dtype=dtype), World(0, 1, 0, CPU, None)
    expected = pytest.raises(ModelError, match="those after it in sight") if sees else contextlib.nullcontext()
    with expected:
        choose_road(settings, model, model.config, world=world, divided=False, autocast=autocast(settings, CPU))


def test_a_model_whose_logits_are_no_numbers_is_refused_for_its_weights() -> None:
    model = a_model("llama", None)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"name_or_path: its logits are no numbers"):
        choose_road(ModelConfig(name_or_path="x", dtype="float32"), model, model.config, divided=False,
                    world=World(0, 1, 0, CPU, None), autocast=contextlib.nullcontext)
