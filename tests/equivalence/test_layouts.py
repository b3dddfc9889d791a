"""Packed and padded batches: two layouts, one number. For every task and family of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftune.config.schema import EvaluationConfig, TrainConfig
from peftune.data.examples import Example
from peftune.data.layouts import PADDED, Layout, lay_out
from peftune.data.targets import Targets
from peftune.model import packing
from peftune.model.next_token import end_in_losses
from peftune.model.outputs import LOOKED_AT
from peftune.model.packing import use_packing
from peftune.model.packing_proof import packing_fault
from peftune.model.reference import reference_of
from peftune.numerics.losses import IGNORE
from peftune.tasks import TASKS

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96, "pad_token_id": 0, "num_labels": 3,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen2 with sliding windows": lambda: Qwen2Config(
        **{k: v for k, v in GROUPED.items() if k != "head_dim"}, use_sliding_window=True, sliding_window=5,
        max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "bert": lambda: BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "albert": lambda: AlbertConfig(**SIZES, embedding_size=16),
    "modernbert": lambda: ModernBertConfig(**SIZES, local_attention=6, global_attn_every_n_layers=2),
}
HEADS = {"sequence_classification": AutoModelForSequenceClassification,
         "token_classification": AutoModelForTokenClassification,
         "question_answering": AutoModelForQuestionAnswering,
         "causal_lm": AutoModelForCausalLM, "preference": AutoModelForCausalLM}
TARGETS = {"sequence_classification": Targets("single_label", ("a", "b", "c"), "class"),
           "token_classification": Targets("bio", ("O", "B-x", "I-x")), "question_answering": Targets("answer"),
           "causal_lm": Targets("next_token"), "preference": Targets("preference", kind="pair")}
CASES = [(family, task) for family in FAMILIES for task in HEADS
         if not ("bert" in family and task in ("causal_lm", "preference"))
         and not (family == "qwen2 with sliding windows" and task == "question_answering")]
LENGTHS = (17, 17, 9, 23, 1, 17, 4)


def a_model(family: str, task: str) -> nn.Module:
    config = FAMILIES[family]()
    config.use_cache = False
    config.num_labels = 2 if task == "question_answering" else 3
    torch.manual_seed(0)
    model = HEADS[task].from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)  # attention that is far from uniform shows every leak
    if task in ("causal_lm", "preference"):
        end_in_losses(model)
    return model.float().eval()  # some output layers have dropout


def examples_of(task: str) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return (torch.randint(60, (length,), generator=generator) + 1).tolist()

    found = []
    for number, length in enumerate(LENGTHS):
        tokens = ids(length)
        if task == "sequence_classification":
            found.append(Example(tokens, [number % 3], 1, length, {}))
        elif task == "token_classification":
            found.append(Example(tokens, [IGNORE if i % 3 == 2 else i % 3 for i in range(length)], length, length, {}))
        elif task == "question_answering":
            marks = [0] * length
            marks[length // 2] += 1
            marks[-1] += 2
            found.append(Example(tokens, marks, 1, length, {}))
        elif task == "causal_lm":
            labels = [token if i > length // 3 or length == 1 else IGNORE for i, token in enumerate(tokens)]
            found.append(Example(tokens, labels, sum(x != IGNORE for x in labels[1:]), length, {}))
        else:
            other = ids(length + 3)
            found.append(Example([*tokens, *other], [*tokens, *other], 1, length + 3, {}, first_part=length))
    return found


def loss_and_gradients(
    model: nn.Module, task_name: str, layout: Layout
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    task, targets = TASKS[task_name](TrainConfig(), EvaluationConfig()), TARGETS[task_name]
    examples = examples_of(task_name)
    batch = lay_out(examples, range(len(examples)), layout=layout, pad_id=0, kind=targets.kind, width=3,
                    device=torch.device("cpu"))
    reference = reference_of(a_model("llama", task_name).eval()) if task.needs_reference else None
    if reference is not None and layout.kind != "padded":
        other = a_model("llama", task_name)
        use_packing(other, pooled=False, first_position=0)
        reference = reference_of(other.eval())
    model.zero_grad()
    losses = task.losses(task.forward(model, batch, reference), batch, targets)
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_layout(model: nn.Module, task: str, *, few_sizes: bool = False) -> Layout:
    kind = use_packing(model, pooled=task == "sequence_classification", first_position=0, few_sizes=few_sizes)
    assert kind == "segments"
    return Layout(kind, few_sizes=few_sizes)


def assert_equal(mine: torch.Tensor, other: torch.Tensor, what: str, scale: float | None = None) -> None:
    """Equal to 1e-5 of the largest value; gradients, some of which are sums that cancel, to 1e-5 of the largest one."""
    largest = float(other.abs().max()) if scale is None else scale
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * largest, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("few_sizes", [False, True], ids=["", "filled up"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_packed_losses_and_gradients_equal_padded_ones(family: str, task: str, few_sizes: bool) -> None:
    model, tokens = a_model(family, task), []
    losses, gradients = loss_and_gradients(model, task, PADDED)
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, output: tokens.append(inputs[0].shape[-1]))
    packed_losses, packed_gradients = loss_and_gradients(model, task, packed_layout(model, task, few_sizes=few_sizes))
    assert tokens and all((count % 32 == 0) == few_sizes for count in tokens)
    assert_equal(packed_losses, losses, "losses")
    assert packed_gradients.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert_equal(packed_gradients[name], gradient, name, largest)


@pytest.mark.parametrize(("family", "task"), CASES)
def test_a_model_prepared_for_packing_computes_padded_batches_as_before(family: str, task: str) -> None:
    model = a_model(family, task)
    losses, _ = loss_and_gradients(model, task, PADDED)
    packed_layout(model, task)
    again, _ = loss_and_gradients(model, task, PADDED)
    assert torch.equal(again, losses)


def fault_of(
    model: nn.Module, layout: Layout, *, pooled: bool, lengths: Sequence[int] = (8, 16, 2, 2)
) -> str | None:
    def inputs(sequences: Any, packed: bool) -> dict[str, Any]:
        examples = [Example(ids, [IGNORE] * len(ids), 0, len(ids), {}) for ids in sequences]
        return lay_out(examples, range(len(examples)), layout=layout if packed else PADDED, pad_id=0,
                       kind="class" if pooled else "token", width=0, device=torch.device("cpu")).inputs

    return packing_fault(model, inputs, lengths=lengths, vocabulary=61, padding=0, dtype=torch.float32,
                         autocast=torch.no_grad, pooled=pooled)


@pytest.mark.parametrize("few_sizes", [False, True], ids=["", "filled up"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_proof_before_a_run_finds_no_fault_in_packing(family: str, task: str, few_sizes: bool) -> None:
    model = a_model(family, task)
    layout = packed_layout(model, task, few_sizes=few_sizes)
    assert fault_of(model, layout, pooled=task == "sequence_classification") is None


def over_all(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Attention that forgets the borders."""
    padded = kwargs.pop("segment_lengths", None) is None
    return sdpa_attention_forward(module, query, key, value, mask if padded else None, **kwargs)


@pytest.mark.parametrize(("family", "task"), [("llama", "causal_lm"), ("bert", "token_classification"),
                                              ("modernbert", "sequence_classification")])
def test_a_planted_leak_across_borders_is_found_by_the_proof_and_by_the_losses(
    family: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "segment_attention", over_all)
    model = a_model(family, task)
    layout = packed_layout(model, task)
    assert fault_of(model, layout, pooled=task == "sequence_classification") == "packed examples read each other"
    losses, _ = loss_and_gradients(model, task, PADDED)
    leaking, _ = loss_and_gradients(model, task, layout)
    with pytest.raises(AssertionError):
        assert_equal(leaking, losses, "losses")
    monkeypatch.undo()
    packing.register()


def test_the_proof_of_long_rows_takes_few_logits_and_finds_a_leak_all_the_same(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, lengths = a_model("llama", "causal_lm"), [], (200, 400, 2, 2)
    layout = packed_layout(model, "causal_lm")
    model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[:-1].numel()))
    assert fault_of(model, layout, pooled=False, lengths=lengths) is None
    assert rows and max(rows) <= 4 * 3 * LOOKED_AT
    monkeypatch.setattr(packing, "segment_attention", over_all)
    layout = packed_layout(model, "causal_lm")
    assert fault_of(model, layout, pooled=False, lengths=lengths) == "packed examples read each other"
    monkeypatch.undo()
    packing.register()


def test_a_lack_of_memory_in_the_proof_is_no_fault_of_the_model() -> None:
    model = a_model("llama", "causal_lm")
    layout = packed_layout(model, "causal_lm")

    def lacks(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.lm_head.register_forward_hook(lacks)
    with pytest.raises(torch.OutOfMemoryError):
        fault_of(model, layout, pooled=False)


def test_transformers_own_packing_leaks_with_a_cache_and_the_proof_says_so() -> None:
    model = a_model("llama", "causal_lm")
    model.config.use_cache = True

    def inputs(sequences: Any, packed: bool) -> dict[str, Any]:
        layout = Layout("segments") if packed else PADDED
        made = lay_out([Example(ids, [IGNORE] * len(ids), 0, len(ids), {}) for ids in sequences],
                       range(len(sequences)), layout=layout, pad_id=0, kind="token", width=0,
                       device=torch.device("cpu")).inputs
        ours = {"segment_lengths", "attention_mask"} if packed else set()
        return {name: value for name, value in made.items() if name not in ours}

    assert packing_fault(model, inputs, lengths=(8, 16, 2, 2), vocabulary=61, padding=0, dtype=torch.float32,
                         autocast=torch.no_grad, pooled=False) == "packed examples read each other"


def test_wrong_positions_are_found_by_the_proof() -> None:
    model = a_model("bert", "token_classification")
    packed_layout(model, "token_classification")
    fault = fault_of(model, Layout("segments", first_position=1), pooled=False)
    assert fault is not None and "differ from separate ones" in fault
