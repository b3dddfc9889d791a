"""Rows that several ranks share: how they are cut, what attention computes, and what is refused."""

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, Phi3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from peftune.cli import main
from peftune.config.load import load
from peftune.config.sequence_rules import SEQUENCE_RULES, sequence_faults
from peftune.data.examples import Example
from peftune.data.layouts import Layout, lay_out
from peftune.errors import ConfigError, MachineError
from peftune.model.division import division_fault, refuse_undividable
from peftune.model.packing import segment_attention, use_packing
from peftune.numerics.losses import IGNORE
from peftune.parallel.launcher import choose_launch
from peftune.parallel.names import check_launched, sequence_ranks
from peftune.parallel.sequences import open_sequences
from peftune.parallel.world import World
from tests.conftest import write_config
from tests.unit.test_numerics import next_token_nats

CPU = torch.device("cpu")


@dataclass
class Threads:
    """Ranks that are threads of this process, and exchange through a table."""

    ranks: int
    table: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.ranks, timeout=60)

    def run(self, work):
        """Each place's result."""
        found: dict[int, Any] = {}
        threads = [threading.Thread(target=lambda place=place: found.update({place: work(Place(self, place))}))
                   for place in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[place] for place in range(self.ranks)]


@dataclass
class Place:
    """One of them: a Division."""

    threads: Threads
    place: int

    @property
    def ranks(self):
        return self.threads.ranks

    def exchange(self, parts):
        self.threads.table[self.place] = parts
        self.threads.barrier.wait()
        received = torch.stack([self.threads.table[i][self.place] for i in range(self.ranks)])
        self.threads.barrier.wait()
        return received

    def sum(self, tensor):
        raise NotImplementedError


def places(ranks):
    return [Place(Threads(ranks), place) for place in range(ranks)]


def drawn(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(5, 50, (length,), generator=generator).tolist()
        on = torch.rand(length, generator=generator) < 0.5
        examples.append(Example(ids, [i if keep else IGNORE for i, keep in zip(ids, on, strict=True)], 0, length, {}))
    return examples


def laid_out(examples, division=None):
    return lay_out(examples, range(len(examples)), layout=Layout("segments", 0, division), pad_id=1, kind="token",
                   width=0, device=CPU)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=5), ranks=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_parts_of_a_row_are_equally_long_make_up_the_row_and_their_losses_its_loss(lengths, ranks, seed):
    examples = drawn(lengths, seed)
    whole, parts = laid_out(examples), [laid_out(examples, division) for division in places(ranks)]
    tokens = whole.inputs["input_ids"].shape[1]
    held = {part.inputs["input_ids"].shape[1] for part in parts}
    assert held == {-(-tokens // ranks)} and len({part.tokens for part in parts}) == 1
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([part.inputs[name] for part in parts], 1)[:, :tokens], whole.inputs[name])
    logits = torch.randn(1, held.pop() * ranks, 60, dtype=torch.float64)
    nats = [next_token_nats(own, part.targets, part.owners, len(part.lengths))
            for own, part in zip(logits.chunk(ranks, 1), parts, strict=True)]
    together = next_token_nats(logits[:, :tokens], whole.targets, whole.owners, len(whole.lengths))
    torch.testing.assert_close(torch.stack(nats).sum(0), together, rtol=0, atol=1e-12)


@dataclass
class Layer:
    """What an attention layer says of itself."""

    num_key_value_groups: int
    is_causal: bool = True


@pytest.mark.parametrize(("heads", "key_heads", "ranks"), [(4, 4, 2), (4, 2, 2), (4, 2, 4), (4, 1, 2), (6, 2, 3),
                                                           (12, 4, 6), (8, 2, 8)])
@pytest.mark.parametrize("window", [None, 3])
def test_ranks_with_a_part_of_the_heads_compute_what_one_with_all_computes(heads, key_heads, ranks, window):
    torch.manual_seed(0)
    lengths, size = (7, 7, 1, 9), 24
    query, key, value = (torch.randn(1, n, size, 5, dtype=torch.float64) for n in (heads, key_heads, key_heads))
    layer, window = Layer(heads // key_heads), {} if window is None else {"sliding_window": window}
    whole, _ = segment_attention(layer, query, key, value, None, segment_lengths=lengths, **window)

    def part(division):
        own = (states.chunk(ranks, 2)[division.place] for states in (query, key, value))
        return segment_attention(layer, *own, None, segment_lengths=lengths, exchange=division.exchange, **window)[0]

    torch.testing.assert_close(torch.cat(Threads(ranks).run(part), 1), whole, rtol=0, atol=1e-12)
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    if not window:
        plain, _ = sdpa_attention_forward(layer, query, key, value, mask[None, None])
        torch.testing.assert_close(whole, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixing", [False, True])
def test_the_proof_finds_a_model_that_mixes_tokens_elsewhere_than_in_attention(decoder, mixing):
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    assert use_packing(model, pooled=False, first_position=0) == "segments"
    if mixing:
        model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out + 0.5 * out.roll(1, dims=1))

    def prove(division):
        return division_fault(
            model, lambda ids, divide: laid_out([Example(row, [IGNORE] * len(row), 0, 0, {}) for row in ids],
                                                division if divide else None).inputs,
            lengths=(20, 41, 2), place=division.place, vocabulary=300, padding=1, tolerance=1e-4,
            autocast=torch.no_grad)

    found = Threads(2).run(prove)
    assert any(found) == mixing, found


def test_heads_that_the_ranks_cannot_share_are_refused_with_the_numbers_that_can():
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4)
    for ranks in (2, 3, 4, 6, 12):
        refuse_undividable(config, ranks)
    with pytest.raises(ConfigError, match="12 attention heads cannot be shared by 8 ranks") as caught:
        refuse_undividable(config, 8)
    assert caught.value.faults[0].mend == "--sequence-parallel 2, 3, 4, 6, 12"
    with pytest.raises(ConfigError, match="no common number of attention heads"):
        refuse_undividable(MambaConfig(), 2)


def test_rotary_embeddings_that_depend_on_the_whole_row_are_refused():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4,
               "original_max_position_embeddings": 64}
    config = Phi3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, rope_parameters=scaling,
                        max_position_embeddings=256, original_max_position_embeddings=64)
    with pytest.raises(ConfigError, match="longrope"):
        refuse_undividable(config, 2)
    refuse_undividable(LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 2)


@pytest.mark.parametrize("override", [
    "task=sequence_classification", "data.layout=padded", "model.attention=eager", "model.attention=flash_attention_2",
    "adapter={method: prompt_tuning, num_virtual_tokens: 4}", "adapter.init_lora_weights=eva", "model.compile=true",
])
def test_what_cannot_be_divided_is_refused_with_the_nearest_that_can(tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text("task: causal_lm\nmodel: {name_or_path: m}\ndata: {train: t.jsonl}\n")
    assert "--sequence-parallel 0" in sequence_faults(load([str(path), override]), 0)[0].message
    (fault,) = sequence_faults(load([str(path), override]), 2)
    assert "divided among 2" in fault.message and fault.mend
    assert not sequence_faults(load([str(path), override]), 1)
    assert not sequence_faults(load([str(path), "model.attention=sdpa", "data.layout=packed"]), 2)
    assert len(SEQUENCE_RULES) == 6


def test_check_says_what_more_devices_a_sequence_cannot_do(converse, tmp_path, capsys):
    config = str(write_config({**converse, "data": {**converse["data"], "layout": "padded"}}, tmp_path / "c"))
    assert main(["check", config]) == 0
    capsys.readouterr()
    assert main(["check", config, "--sequence-parallel", "3"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "data.layout: not with sequences divided among 3" in said
    assert "4 attention heads cannot be shared by 3 ranks" in said


def test_the_launch_line_hands_down_how_many_share_a_sequence(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = choose_launch("fsdp2", 4, ["c.yaml"], sequence_ranks=2)
    assert "PARALLELISM_CONFIG_SP_SIZE=2" in str(launch)
    for name, value in launch.environment.items():
        monkeypatch.setenv(name, value)
    assert sequence_ranks() == 2
    check_launched("fsdp2")
    with pytest.raises(MachineError, match="3 processes form no groups of 2"):
        open_sequences(World(0, 3, 0, CPU, None))
    with pytest.raises(MachineError, match="only training divides sequences"):
        main(["evaluate", "runs/none"])
    with pytest.raises(MachineError, match="3 processes do not form groups"):
        choose_launch("ddp", 3, ["c.yaml"], sequence_ranks=2)
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "none")
    with pytest.raises(MachineError, match="a number of ranks"):
        sequence_ranks()
