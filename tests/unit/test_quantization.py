"""Quantised weights: what is kept in fewer bits, that it trains as its dequantised self, and what is refused."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peftune.config.load import load
from peftune.config.schema import AdapterConfig, ModelConfig
from peftune.data_check import check
from peftune.errors import ConfigError, MachineError, ModelError
from peftune.model.assemble import assemble, count
from peftune.model.load import load_weights
from peftune.model.precision import enable_gradient_checkpointing
from peftune.model.quantize import dequantise, dequantised_weight, quantization_of
from peftune.model.save import load_trained
from peftune.parallel.replicated import restore_whole, whole_pieces
from tests.conftest import ROOT, metric_rows, mostly_slow, summary, write_config

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra `quantization`")

KINDS = ("int8", "nf4", "fp4")
TOLERANCE = 1e-5
"""Relative, of each step's loss from the run on the dequantised weights: both multiply the same float32 values, and
may sum them in another order; AdamW carries that on."""
CPU = torch.device("cpu")


@pytest.mark.slow
def test_imports_leave_torchs_compiler_alone_and_it_works_afterwards():
    code = """
import os, sys
import peftune.build
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
import torch
compiled = []
def backend(graph, inputs):
    compiled.append(graph)
    return graph.forward
assert torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2)).tolist() == [2, 2]
assert compiled
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def loaded(path, kind, auto_class=AutoModelForCausalLM, dtype=torch.float32, new_head=False):
    section = ModelConfig(name_or_path=path, quantization=kind)
    return load_weights(section, path, AutoConfig.from_pretrained(path), auto_class, dtype=dtype, new_head=new_head,
                        device=CPU)


def quantised_layers(model):
    return {name: module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and dequantised_weight(module) is not None}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_not_kept_in_memory_beside_what_was_quantised_from_it(kind, decoder, tmp_path):
    own = shutil.copytree(decoder, tmp_path / "own")
    model = loaded(str(own), kind).model
    assert quantised_layers(model)
    assert f"{own}/model.safetensors" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "nf4"))
def test_losses_are_those_of_the_same_run_on_the_dequantised_weights(kind, converse, train, decoder, tmp_path):
    model = loaded(decoder, kind).model
    assert quantised_layers(model)
    dequantise(model, torch.float32)
    assert not quantised_layers(model)
    model.save_pretrained(tmp_path / "weights")
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "weights")
    mine = train(converse, f"model.quantization={kind}", name="quantised")
    other = train(converse, f"model.name_or_path={tmp_path / 'weights'}", name="plain")
    unquantised = train(converse, name="unquantised")
    losses, others, far = ([row["loss"] for row in metric_rows(folder, "train")]
                           for folder in (mine, other, unquantised))
    assert losses == pytest.approx(others, rel=TOLERANCE) and len(losses) == 6
    assert losses != pytest.approx(far, rel=10 * TOLERANCE), "the weights were not quantised at all"
    assert summary(mine)["metrics"]["validation"]["loss"] == pytest.approx(
        summary(other)["metrics"]["validation"]["loss"], rel=TOLERANCE)
    weights, plain = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (mine, other))
    assert all((weights[name] - plain[name]).abs().max() < 1e-4 for name in plain)
    assert summary(mine)["total_parameters"] == summary(other)["total_parameters"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_reach_every_adapter_and_are_those_of_the_dequantised_weights(kind, recompute, decoder):
    def gradients(plain):
        section = ModelConfig(name_or_path=decoder, dtype="float32", quantization=kind)
        model, _ = assemble(section, AdapterConfig(r=2, init_lora_weights=False), decoder,
                                AutoConfig.from_pretrained(decoder), AutoModelForCausalLM, task="causal_lm",
                                new_head=False, seed=0)
        if plain:
            for module in model.modules():
                base = getattr(module, "base_layer", None)
                if base is not None:
                    layer = nn.Linear(base.in_features, base.out_features, bias=False)
                    layer.weight = nn.Parameter(dequantised_weight(base), requires_grad=False)
                    module.base_layer = layer
        if recompute:
            enable_gradient_checkpointing(model)
        ids = torch.arange(5, 29).reshape(2, 12)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    mine, other = gradients(False), gradients(True)
    assert len(mine) == 2 * 2 * 7 and all(gradient is not None and gradient.any() for gradient in mine.values())
    for name, gradient in other.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_heads_and_embeddings_stay_as_they_were_loaded(kind, dtype, encoder):
    parts = loaded(encoder, kind, AutoModelForSequenceClassification, dtype, new_head=True)
    layers = quantised_layers(parts.model)
    assert parts.new_modules == ("classifier",)
    assert len(layers) == 2 * 6 and all(".encoder.layer." in name for name in layers)
    kept = {name: p for name, p in parts.model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert {p.dtype for p in kept.values()} == {dtype} and any("LayerNorm" in name for name in kept)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8 + 32 / 256), ("nf4", 4 + 8 / 64 + 32 / (64 * 256)),
                                             ("fp4", 4 + 8 / 64 + 32 / (64 * 256))])
def test_a_weight_takes_the_bits_that_its_kind_promises(kind, bits, tmp_path):
    """Rows of 256 with a float32 scale; or blocks of 64 with a scale of 8 bits, 256 of which share a float32."""
    from tests import tiny

    folder = tiny.save_decoder(tmp_path, hidden_size=256, intermediate_size=256, num_key_value_heads=4)
    layers = quantised_layers(loaded(folder, kind).model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    taken = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in kept_by(layer))
    tables = 0 if kind == "int8" else (256 + 16) * 4 + 4  # of codes, and the scales' mean: a layer's own, equal for all
    assert taken == pytest.approx(weights * bits / 8 + tables * len(layers), rel=1e-3)


def kept_by(layer):
    yield layer.weight.data
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        assert layer.state.CB is None and layer.weight.CB is None, "a second copy, or a name that keeps one whole"
        yield layer.state.SCB
    else:
        state = layer.weight.quant_state
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def test_values_of_8_bits_are_the_nearest_multiples_of_a_rows_largest(decoder):
    plain = AutoModelForCausalLM.from_pretrained(decoder)
    for name, layer in quantised_layers(loaded(decoder, "int8").model).items():
        weight = plain.get_submodule(name).weight.detach().half().float()
        grain = weight.abs().amax(dim=1, keepdim=True) / 127
        values = dequantised_weight(layer)
        torch.testing.assert_close(values / grain, (values / grain).round(), rtol=0, atol=1e-4)
        assert (values - weight).abs().le(0.51 * grain).all()  # a tie may fall either way


def test_a_product_of_8_bits_keeps_no_input_and_casts_to_the_autocast_around_it(decoder, caplog):
    layer = next(iter(quantised_layers(loaded(decoder, "int8").model).values())).eval()
    x = torch.randn(3, 32, requires_grad=True)
    y = layer(x)
    assert all(saved.shape != x.shape for saved in y.grad_fn.saved_tensors)
    torch.testing.assert_close(y, x @ dequantised_weight(layer).T, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ dequantised_weight(layer), rtol=1e-5, atol=1e-6)
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert not caplog.records


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_in_bfloat16_trains_reloads_and_is_scored_the_same_again(kind, classify, train, capsys):
    from peftune.cli import main

    folder = train({**classify, "model": {**classify["model"], "dtype": "bfloat16", "quantization": kind}})
    result = summary(folder)
    assert result["reload_deviation"] <= 1e-2
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--split", "validation", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["validation"]
    assert again["loss"] == pytest.approx(result["metrics"]["validation"]["loss"], rel=1e-3)
    config = json.loads((folder / "final" / "config.json").read_text())
    assert "quantization_config" not in config, "it would say of the base's checkpoint what is not true of it"
    assert "BitsAndBytesConfig(**{" in (folder / "final" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_loftq_starts_as_near_to_the_whole_weights_as_its_rank_allows(kind, decoder):
    def assembled(**fields):
        section = ModelConfig(name_or_path=decoder, dtype="float32", quantization=kind)
        return assemble(section, AdapterConfig(r=4, lora_alpha=12, **fields), decoder,
                        AutoConfig.from_pretrained(decoder), AutoModelForCausalLM, task="causal_lm", new_head=False,
                        seed=0)[0]

    begun, plain = assembled(init_lora_weights="loftq"), assembled()
    whole = dict(AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).named_parameters())
    layers = [(name, layer) for name, layer in begun.get_base_model().named_modules() if hasattr(layer, "lora_A")]
    assert layers
    for name, layer in layers:
        a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        residual = whole[f"{name}.weight"].detach().double() - dequantised_weight(layer.get_base_layer()).double()
        left = torch.linalg.matrix_norm(residual - 3 * b @ a)
        assert left == pytest.approx(torch.linalg.svdvals(residual)[4:].norm().item(), rel=1e-4)
    ids = {"input_ids": torch.arange(5, 17).reshape(1, 12)}
    target = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()(**ids).logits
    near, far = ((model.eval()(**ids).logits - target).norm() for model in (begun, plain))
    assert near < 0.9 * far


def test_a_loftq_run_learns_and_its_folder_is_a_plain_lora_over_the_quantised_base(converse, train):
    folder = train(converse, "model.quantization=nf4", "adapter.init_lora_weights=loftq")
    assert summary(folder)["reload_deviation"] <= 1e-4
    losses = [row["loss"] for row in metric_rows(folder, "train")]
    assert losses[-1] < losses[0]
    assert json.loads((folder / "final" / "adapter_config.json").read_text())["init_lora_weights"] is True


def test_loftq_over_a_checkpoint_that_is_quantised_already_is_refused(stored, converse, tmp_path):
    section = ModelConfig(name_or_path=stored["nf4"], dtype="float32", quantization="nf4")
    with pytest.raises(ModelError, match="what was rounded away is not in them"):
        assemble(section, AdapterConfig(init_lora_weights="loftq"), stored["nf4"],
                 AutoConfig.from_pretrained(stored["nf4"]), AutoModelForCausalLM, task="causal_lm", new_head=False,
                 seed=0)


def test_the_model_card_s_own_lines_load_the_quantised_base(converse, train):
    folder = train(converse, "model.quantization=nf4") / "final"
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(lines.replace("THIS_FOLDER", str(folder)), scope)
    ids = {"input_ids": torch.arange(5, 17).reshape(1, 12)}
    mine = load_trained(folder, AutoModelForCausalLM, dtype=torch.float32, quantization="nf4").eval()
    plain = load_trained(folder, AutoModelForCausalLM, dtype=torch.float32).eval()
    for module in scope["model"].modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):  # its bf16 kernel takes only rows of whole blocks of 64
            module.support_avx512bf16_for_cpu = False
    theirs = scope["model"].eval()(**ids).logits
    torch.testing.assert_close(mine(**ids).logits, theirs, rtol=1e-4, atol=1e-4)
    assert (plain(**ids).logits - theirs).abs().max() > 1e-2


def test_a_preference_run_is_tied_to_the_quantised_model_without_its_adapter(prefer, train):
    folder = train(prefer, "model.quantization=nf4")
    baseline = summary(folder)["baseline"]["validation"]
    assert baseline["loss"] == pytest.approx(0.6931472, abs=1e-6), "an untrained model is its own reference"
    assert baseline["margin"] == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module")
def stored(decoder, tmp_path_factory):
    """Folders of checkpoints that are quantised already."""
    folders = {}
    for kind in ("int8", "nf4"):
        folder = tmp_path_factory.mktemp(f"stored-{kind}")
        loaded(decoder, kind).model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_checkpoint_that_is_quantised_already_trains_as_one_quantised_here(kind, stored, converse, train):
    here = train(converse, f"model.quantization={kind}", name="here")
    there = train(converse, f"model.name_or_path={stored[kind]}", name="there")
    for split in ("train", "validation"):
        mine, other = ([row["loss"] for row in metric_rows(folder, split)] for folder in (there, here))
        assert mine == pytest.approx(other, rel=TOLERANCE)
    assert summary(there)["total_parameters"] == summary(here)["total_parameters"]


@pytest.mark.parametrize(("changes", "said", "mend"), [
    (["model.quantization=int8"], "is stored as nf4 already", "model.quantization=nf4 or none"),
    (["adapter=null"], "quantised weights do not train", "adapter.method=lora"),
], ids=["other kind", "whole weights"])
def test_what_contradicts_a_quantised_checkpoint_is_said_before_it_is_loaded(
    changes, said, mend, stored, converse, tmp_path
):
    path = write_config({**converse, "model": {**converse["model"], "name_or_path": stored["nf4"]}}, tmp_path)
    (fault,) = (fault for fault in check(load([str(path), *changes])).faults if fault.severity == "error")
    assert said in fault.message and mend in fault.mend


def test_a_checkpoint_of_another_method_is_refused(decoder):
    config = AutoConfig.from_pretrained(decoder)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="quantised by gptq"):
        quantization_of(ModelConfig(name_or_path=decoder), config, adapted=True, divided=False)


@pytest.mark.parametrize(("changes", "said"), [
    (["model.quantization=nf4", "adapter=null"], "mend: adapter.method=lora, or model.quantization=none"),
    (["model.quantization=int8", "model.compile=true"], "mend: model.compile=parts"),
], ids=["whole weights", "compiled"])
def test_what_cannot_be_quantised_is_refused_with_the_config(changes, said, converse, tmp_path):
    with pytest.raises(ConfigError, match=said):
        load([str(write_config(converse, tmp_path)), *changes])


@pytest.mark.slow
def test_without_bitsandbytes_one_message_says_how_to_install_it(command, converse, tmp_path):
    hidden = ("import importlib.util as u, sys; find = u.find_spec; "
              "u.find_spec = lambda name, *a: None if name == 'bitsandbytes' else find(name, *a); "
              "from peftune.cli import run; sys.argv = ['peftune', *sys.argv[1:]]; run()")
    for change in ("model.quantization=nf4", "train.optimizer=adamw_8bit"):
        done = command("-c", hidden, "check", write_config(converse, tmp_path), change)
        assert done.returncode == 2 and done.stdout.count("bitsandbytes, which is not installed") == 1, done.stderr
        assert 'mend: pip install "peftune[quantization]"' in done.stdout


WIDE = {"adapter": {"method": "lora", "r": 64}}
"""2,048 to 4,096 values a matrix: optimizer states of 8 bits and of 32 lie side by side."""


def test_an_optimizer_of_8_bits_learns_and_goes_on_bit_for_bit(converse, train):
    settings = {**converse, **WIDE, "train": {**converse["train"], "optimizer": "adamw_8bit"}}
    unbroken = train(settings, name="unbroken")
    saved = unbroken / "checkpoints" / "step-000004"
    tensors = load_file(next(saved.glob("tensors-*.safetensors")))
    kinds = {tensor.dtype for name, tensor in tensors.items() if name.endswith("|state1")}
    assert kinds == {torch.uint8, torch.float32}
    resumed = train(settings, f"resume={saved}", name="resumed")
    mine, other = (metric_rows(folder, "train") for folder in (resumed, unbroken))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in mine] == [row[key] for row in other[4:]]
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (resumed, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain = train({**settings, "train": converse["train"]}, name="plain")
    losses, exact = ([row["loss"] for row in metric_rows(folder, "train")] for folder in (unbroken, plain))
    assert losses == pytest.approx(exact, rel=2e-2) and losses != exact


def test_a_paged_optimizer_is_refused_where_there_is_nothing_to_page(converse, train):
    with pytest.raises(MachineError, match=r"mend: train\.optimizer=adamw_8bit"):
        train(converse, "train.optimizer=paged_adamw_8bit")


def test_weights_in_4_bits_are_counted_one_by_one(decoder):
    section = ModelConfig(name_or_path=decoder, dtype="float32")
    counts = [count(assemble(section.model_copy(update={"quantization": kind}), AdapterConfig(r=2), decoder,
                             AutoConfig.from_pretrained(decoder), AutoModelForCausalLM, task="causal_lm",
                             new_head=False, seed=0)[0]) for kind in ("none", "nf4", "int8")]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_states_of_a_paged_optimizer_are_restored_into_buffers_of_its_own():
    """On a CPU its buffers are plain ones; that it is asked for them is what can be seen here."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def trained(**paged):
        model = torch.nn.Linear(64, 64, bias=False)
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.1, **paged)
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        return model, optimizer

    saved = {piece.name: piece.values.view(piece.shape) for piece in whole_pieces(*trained())}
    model, optimizer = trained(is_paged=True)
    buffer_of, given = optimizer.get_state_buffer, []
    optimizer.get_state_buffer = lambda *args, **kwargs: given.append(buffer_of(*args, **kwargs)) or given[-1]
    restore_whole(model, optimizer, saved.get)
    state = optimizer.state[model.weight]
    assert state["state1"] is given[0] and state["state2"] is given[1]
    assert torch.equal(state["state1"], saved["weight|state1"]) and state["step"] == 1


def test_an_optimizer_of_8_bits_over_bfloat16_weights_goes_on_at_the_step_where_it_was():
    """bfloat16 has no 257."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.1)
    model(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["step"] = 257
    saved = {piece.name: piece.values.view(piece.shape) for piece in whole_pieces(model, optimizer)}
    restore_whole(model, optimizer, saved.get)
    assert optimizer.state[model.weight]["step"] == 257
