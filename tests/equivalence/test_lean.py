"""Lean LoRA layers and norms beside peft's and transformers' own: one function, one gradient, fewer bytes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GlmConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    Olmo2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from peftune.model.lean import make_lean
from peftune.model.lean_gated import LeanGatedMLP
from peftune.model.lean_lora import LeanLoraLinear
from peftune.model.lean_norm import LeanRMSNorm
from peftune.model.lean_rotary import LeanRotation
from peftune.model.precision import enable_gradient_checkpointing
from peftune.numerics.passes import PLAIN

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False}
FLOAT32_NORMS = 1e-6
"""Tolerance in float64: norms compute in float32 all the same, and sum in another order in backward."""
IDS = torch.arange(2 * 17).view(2, 17) % 61


def adapted(
    kind: Any = LlamaConfig, dtype: torch.dtype = torch.float32, activation: str = "silu", **fields: Any
) -> PeftModel:
    """A tiny model whose adapter has left its start."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(kind(**SIZES, attention_bias=True, hidden_act=activation), dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, **{"target_modules": "all-linear", **fields}),
                           autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or "norm" in name:
                parameter += torch.randn_like(parameter) / 4
    return model.train()


def lean(model: PeftModel) -> PeftModel:
    twin = copy.deepcopy(model)
    make_lean(twin, by_module=False)
    return twin


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_one_step(plain: nn.Module, twin: nn.Module, tolerance: float) -> None:
    (loss, gradients), (twin_loss, twin_gradients) = step(plain), step(twin)
    assert twin_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert twin_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(twin_gradients[name], gradient, rtol=0, atol=tolerance * largest, msg=name)


def layers(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("part", ["layers.0.self_attn.o_proj", "layers.0.mlp"])
def test_what_a_lean_layer_gives_may_be_changed_in_place(part: str) -> None:
    """As Gemma 3n scales what one of its linear layers gives, and Llama 4 adds to what its shared expert does."""
    plain = adapted()
    twin = lean(plain)
    for model in (plain, twin):
        model.get_submodule(f"base_model.model.model.{part}").register_forward_hook(lambda *given: given[2].mul_(2.0))
    assert_one_step(plain, twin, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_lean_lora_layer_has_peft_s_outputs_and_gradients_in_float64(bias: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=bias)).double(),
                           LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False),
                           autocast_adapter_dtype=False)
    twin = copy.deepcopy(model)
    make_lean(twin, by_module=False)
    assert layers(twin, LeanLoraLinear) == 1
    results = []
    for one in (model, twin):
        x = torch.linspace(-1, 1, 2 * 7 * 24, dtype=torch.float64).view(2, 7, 24).requires_grad_()
        y = one(x)
        y.sin().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, Olmo2Config])
def test_a_lean_model_takes_the_step_of_the_plain_one(kind: Any) -> None:
    plain = adapted(kind, torch.float64)
    twin = lean(plain)
    assert (layers(twin, LeanLoraLinear), layers(twin, LeanGatedMLP), layers(twin, LeanRotation)) == (14, 2, 2)
    assert_one_step(plain, twin, FLOAT32_NORMS)


def test_a_lean_model_takes_the_step_of_the_plain_one_where_activations_are_recomputed() -> None:
    plain = adapted(dtype=torch.float64)
    twin = lean(plain)
    for model in (plain, twin):
        enable_gradient_checkpointing(model)
    assert_one_step(plain, twin, FLOAT32_NORMS)


def test_norms_that_train_have_the_same_gradient() -> None:
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float64).train()
    twin = copy.deepcopy(plain)
    make_lean(twin, by_module=False)
    assert layers(twin, LeanRMSNorm) == 5
    assert_one_step(plain, twin, FLOAT32_NORMS)


def test_under_autocast_a_lean_lora_layer_is_as_near_to_float64_as_peft_s() -> None:
    torch.manual_seed(0)
    exact = get_peft_model(nn.Sequential(nn.Linear(64, 96)), LoraConfig(
        r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False), autocast_adapter_dtype=False)
    exact.get_base_model()[0].base_layer.bfloat16()
    x, slope = torch.randn(200, 64).bfloat16(), torch.randn(200, 96).bfloat16()

    def results(model: nn.Module, dtype: torch.dtype, mixed: bool) -> list[Tensor]:
        given = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            output = model(given)
        output.backward(slope.to(output.dtype))
        return [output, given.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    plain, twin = copy.deepcopy(exact), lean(exact)
    truth = results(exact.double(), torch.float64, mixed=False)
    distances = [[((found - true).norm() / true.norm()).item() for found, true in zip(
        results(model, torch.bfloat16, mixed=True), truth, strict=True)] for model in (plain, twin)]
    for theirs, ours in zip(*distances, strict=True):
        assert ours < 1.25 * theirs < 0.01


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True},
    {"bias": "lora_only", "target_modules": ["q_proj"]}])
def test_what_is_not_plain_stays_peft_s_own(change: dict[str, Any]) -> None:
    plain = adapted(**change)
    twin = lean(plain)
    outputs = []
    for model in (plain, twin):
        torch.manual_seed(1)
        outputs.append(model(input_ids=IDS).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("how", ["without gradients", "disabled", "merged"])
def test_passes_that_do_not_learn_are_those_of_plain_peft_bit_for_bit(how: str) -> None:
    plain = adapted().eval()
    twin = lean(plain)

    def logits(model: PeftModel) -> Tensor:
        if how == "disabled":
            with model.disable_adapter():
                return model(input_ids=IDS).logits
        if how == "merged":
            model.merge_adapter()
            return model(input_ids=IDS).logits
        with torch.no_grad():
            return model(input_ids=IDS).logits

    assert torch.equal(logits(plain), logits(twin))


def test_lora_layers_whose_weights_are_gathered_one_by_one_stay_peft_s_own() -> None:
    model = adapted()
    make_lean(model, by_module=True)
    assert layers(model, LeanLoraLinear) == layers(model, LeanGatedMLP) == 0
    assert layers(model, LeanRMSNorm) == 5


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"], ["gate_proj"]], ids=str)
def test_a_lean_gated_block_has_the_outputs_and_gradients_of_the_plain_one_in_float64(activation: str, targets: Any
                                                                                       ) -> None:
    plain = adapted(dtype=torch.float64, activation=activation, target_modules=targets)
    twin, results = lean(plain), []
    for model in (plain, twin):
        block = model.get_base_model().model.layers[1].mlp
        x = torch.linspace(-1, 1, 2 * 7 * 32, dtype=torch.float64).view(2, 7, 32).requires_grad_()
        y = block(x)
        y.sin().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    assert type(block) is LeanGatedMLP and len(results[0]) == {"all-linear": 8}.get(str(targets), 4)
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_block_that_computes_something_else_stays_as_it_is() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain = adapted()
    plain.get_base_model().model.layers[0].mlp.__class__ = Scaled
    assert layers(lean(plain), LeanGatedMLP) == 1


def test_norms_of_another_formula_stay_as_they_are() -> None:
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8))
    make_lean(model, by_module=False)
    assert layers(model, LeanRMSNorm) == 0


@pytest.mark.parametrize("kind", [GlmConfig, ModernBertDecoderConfig])
def test_rotations_of_another_formula_stay_as_they_are(kind: Any) -> None:
    model = AutoModelForCausalLM.from_config(kind(**SIZES, head_dim=8, eos_token_id=1, bos_token_id=1, cls_token_id=1,
                                                  sep_token_id=1))
    make_lean(model, by_module=False)
    assert layers(model, LeanRotation) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lean_rotation_has_the_bits_of_the_plain_one_and_its_gradient(dtype: torch.dtype) -> None:
    plain = adapted(dtype=dtype).get_base_model().model.layers[0].self_attn
    twin, results = copy.deepcopy(plain), []
    make_lean(twin, by_module=True)
    assert isinstance(twin, LeanRotation) and isinstance(twin, type(plain))
    angles = torch.arange(11 * 8).view(1, 11, 8).to(dtype)
    for attention in (plain, twin):
        x = torch.linspace(-1, 1, 2 * 11 * 32).view(2, 11, 32).to(dtype).requires_grad_()
        y, _ = attention(x, (angles.cos(), angles.sin()))
        y.sin().sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_what_turns_a_part_of_each_head_alone_is_left_to_the_model() -> None:
    attention = adapted().get_base_model().model.layers[0].self_attn
    make_lean(attention, by_module=True)
    rotate = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    x = torch.ones(1, 4, 3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="must match the size"):  # as transformers' own function does
        rotate(x, x, torch.ones(1, 3, 6), torch.ones(1, 3, 6))


def test_a_lean_model_keeps_fewer_bytes_for_backward() -> None:
    def kept(model: nn.Module) -> int:
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        found = sum(tensor.untyped_storage().nbytes() for at, tensor in storages.items() if at not in weights)
        loss.backward()
        return found

    plain = adapted(dtype=torch.bfloat16)
    twin = lean(plain)
    assert kept(twin) < 0.8 * kept(plain)


def test_a_lean_model_is_saved_as_plain_peft(tmp_path: Any) -> None:
    plain = adapted()
    lean(plain).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(adapted().unload(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)


def test_lean_layers_can_be_given_other_passes() -> None:
    model = lean(adapted())
    attention = type(model.get_base_model().model.layers[0].self_attn)
    other = replace(PLAIN, rotated=lambda x, cos, sin: PLAIN.rotated(x, cos, sin))
    make_lean(model, by_module=False, passes=other)
    again = type(model.get_base_model().model.layers[0].self_attn)
    assert again is not attention and again.__bases__ == attention.__bases__
    assert all(module.passes is other for module in model.modules() if isinstance(module, LeanRMSNorm | LeanGatedMLP))
