"""A training step asks the device for no number before its end: each question would wait for all work queued there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peftune.build import build
from peftune.config.load import load
from tests.conftest import write_config

ASK = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "unique_dim",
       "unique_consecutive"}
"""Operators whose result, or its size, is known only when the device has computed it."""


class Questions(TorchDispatchMode):
    """Names of the asking operators that ran."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if name in ASK or by_mask:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["converse", "prefer", "classify", "tag", "answer"])
def test_forward_and_backward_of_a_micro_batch_ask_the_device_for_nothing(task, request, tmp_path):
    settings = request.getfixturevalue(task)
    settings["data"]["layout"] = "packed"
    with build(load([str(write_config(settings, tmp_path / "config"))])) as built:
        run = built.run
        batch = next(iter(run.work(0).micro_batches))
        run.losses(run.model, batch).sum().backward()  # what is prepared once may ask
        with Questions() as questions, run.autocast():
            run.losses(run.model, batch).sum().backward()
    assert questions.asked == []


def test_a_question_is_seen():
    with Questions() as questions:
        assert (torch.arange(3.0).sum() > 1).item()
        values = torch.arange(3)
        values[values > 1] = 0
    assert questions.asked == ["_local_scalar_dense", "index_put_"]
