"""The step's gradient does not depend on how its targets fall into micro-batches."""

import contextlib
import copy

import pytest
import torch

from peftune.config.schema import EvaluationConfig, TrainConfig
from peftune.data.examples import Example
from peftune.data.layouts import lay_out
from peftune.data.targets import Targets
from peftune.loop.step import StepWork, train_step
from peftune.model.next_token import end_in_losses, take_road
from peftune.numerics.losses import IGNORE
from peftune.parallel.single import Single
from peftune.parallel.world import World
from peftune.tasks import TASKS
from tests import tiny

WORLD = World(0, 1, 0, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(tiny.save_decoder(tmp_path_factory.mktemp("m"))).double()
    end_in_losses(made)
    take_road(made, 16)
    return made


@pytest.fixture(scope="module")
def examples():
    """Eight examples with 1 to 60 targets: a mean of micro-batch means would be far off."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, targets in ((4, 1), (70, 60), (10, 2), (33, 30), (5, 1), (64, 3), (8, 8), (20, 1)):
        ids = torch.randint(2, 400, (length,), generator=generator).tolist()
        made.append(Example(ids, [IGNORE] * (length - targets) + ids[length - targets:], min(targets, length - 1),
                            length, {"source": "x"}))
    return made


def step_once(model, examples, groups):
    """SGD with rate 1: the change of a weight is the gradient."""
    live = copy.deepcopy(model)
    batches = [lay_out([examples[i] for i in group], group, pad_id=1, kind="token", width=0, device=WORLD.device)
               for group in groups]
    work = StepWork(batches, len(batches), 8, 0, sum(e.num_targets for e in examples), list)
    task = TASKS["causal_lm"](TrainConfig(), EvaluationConfig())
    optimizer = torch.optim.SGD(live.parameters(), lr=1.0)
    stats = train_step(
        live, work, optimizer, Single(WORLD), max_grad_norm=None, autocast=contextlib.nullcontext,
        losses=lambda m, b: task.losses(task.forward(m, b, None), b, Targets("next_token")))
    return stats, torch.cat([p.detach().flatten() for p in live.parameters()])


@pytest.mark.parametrize("groups", [
    [[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[0, 1, 2], [3, 4, 5], [6, 7]],
    [[7, 0], [], [1, 2, 3, 4, 5, 6]],
], ids=["halves", "ones", "threes", "with-an-empty-one"])
def test_a_step_over_micro_batches_is_the_step_over_one_batch(model, examples, groups):
    whole, whole_weights = step_once(model, examples, [list(range(8))])
    split, split_weights = step_once(model, examples, groups)
    torch.testing.assert_close(split_weights, whole_weights, rtol=0, atol=1e-13)
    assert split.loss_sum == pytest.approx(whole.loss_sum, rel=1e-13)
    assert split.targets == whole.targets == 105
    assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)


def test_the_step_is_the_mean_over_targets_and_not_the_mean_of_means(model, examples):
    _, ours = step_once(model, examples, [[i] for i in range(8)])
    live = copy.deepcopy(model)
    nats, targets = 0.0, 0
    for example in examples:
        ids = torch.tensor([list(example.input_ids)])
        logp = torch.log_softmax(live(ids).logits[0], -1)
        for position in range(1, len(example.targets)):
            if example.targets[position] != IGNORE:
                nats = nats - logp[position - 1, example.targets[position]]
                targets += 1
    (nats / targets).backward()
    naive = torch.cat([(p.detach() - p.grad).flatten() for p in live.parameters()])
    torch.testing.assert_close(ours, naive, rtol=0, atol=1e-13)
