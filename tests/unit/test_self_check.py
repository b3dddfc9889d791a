"""A run that does not do what it says stops."""

import pytest
import torch

from peftune.data.examples import Example
from peftune.data.store import Split, write
from peftune.errors import SelfCheckError, guarded
from peftune.loop import self_check
from peftune.loop.self_check import SelfCheck, check_end_of_text
from peftune.parallel.single import Single
from peftune.parallel.world import World
from peftune.train import main
from tests.conftest import write_config


def watch(model, optimizer, steps=2, before_step=lambda step: None):
    check = SelfCheck(model, optimizer, Single(World(0, 1, 0, torch.device("cpu"), None)))
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        check.gradients(model)
        before_step(step)
        optimizer.step()
        check.after_step()


def model_of(*layers):
    torch.manual_seed(0)
    return torch.nn.Sequential(*layers)


def test_a_model_that_trains_passes():
    model = model_of(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    watch(model, torch.optim.AdamW(model[1].parameters(), lr=0.1))


def test_a_trainable_tensor_outside_the_loss_is_found():
    class Aside(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.unused = torch.nn.Parameter(torch.ones(1))

    model = model_of(Aside())
    with pytest.raises(SelfCheckError, match=r"take no part in the loss.*unused"):
        watch(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_frozen_tensor_that_changes_is_found():
    model = model_of(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    with pytest.raises(SelfCheckError, match="frozen tensors changed"):
        watch(model, torch.optim.SGD(model[1].parameters(), lr=0.1),
              before_step=lambda step: model[0].weight.data.add_(1.0))


def test_a_change_in_any_part_of_a_large_frozen_tensor_is_found(monkeypatch):
    monkeypatch.setattr(self_check, "SUMMED_AT_ONCE", 4)
    model = model_of(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    for place in range(9):
        with pytest.raises(SelfCheckError, match="frozen tensors changed"):
            watch(model, torch.optim.SGD(model[1].parameters(), lr=0.1),
                  before_step=lambda step, at=place: model[0].weight.data.view(-1)[at].add_(1.0))


def test_a_tensor_that_the_optimizer_forgot_is_found():
    model = model_of(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    with pytest.raises(SelfCheckError, match="did not move"):
        watch(model, torch.optim.SGD(model[1].parameters(), lr=0.1))


def test_a_rate_too_small_for_the_type_is_no_fault():
    model = model_of(torch.nn.Linear(3, 2))
    watch(model, torch.optim.SGD(model.parameters(), lr=1e-12))


@pytest.mark.parametrize(("targets", "passes"), [([-100, 5, 1], True), ([-100, 5, 7], False)])
def test_answers_that_do_not_end_are_found(tmp_path, targets, passes):
    write(tmp_path / "x.arrow", [Example([3, 5, targets[-1]], targets, 2, 3, {"source": "f:1"})], "token")
    split = Split([tmp_path / "x.arrow"], "token")
    if passes:
        check_end_of_text(split, 1)
    else:
        with pytest.raises(SelfCheckError, match="end-of-text"):
            check_end_of_text(split, 1)


class Wrapped:
    """An engine's own optimizer around torch's, which is none of torch's classes."""

    def __init__(self, inner):
        self.param_groups, self.step, self.zero_grad = inner.param_groups, inner.step, inner.zero_grad


@pytest.mark.parametrize("wrapped", [lambda optimizer: optimizer, Wrapped])
@pytest.mark.parametrize("rate", [0.1, 1e-3])
def test_a_step_of_sgd_that_its_gradient_makes_too_small_to_move_a_weight_is_no_fault(rate, wrapped):
    class NearlyFlat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.key_bias = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

        def forward(self, x):
            return (x * self.weight + 1e-9 * self.key_bias).sum()

    model = NearlyFlat()
    watch(model, wrapped(torch.optim.SGD(model.parameters(), lr=rate)))
    with pytest.raises(SelfCheckError, match=r"did not move.*weight"):
        watch(model, wrapped(torch.optim.SGD(model.parameters(), lr=rate)), before_step=lambda step: model.zero_grad())


def test_an_adapter_that_cannot_learn_is_found_though_its_new_head_learns(classify, tmp_path, capsys):
    settings = {**classify, "adapter": {"method": "lora", "r": 4, "lora_alpha": 0}}
    assert guarded(main, [str(write_config(settings, tmp_path / "c"))]) == 2
    assert "every gradient is zero but the new head's" in capsys.readouterr().err
