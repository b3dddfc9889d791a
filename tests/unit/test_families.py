"""Families of models that are built, named or stored otherwise than Llama: what trains of them, and what is saved."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CTRLConfig,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    FNetConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma4Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LongformerConfig,
    Mamba2Config,
    Mistral3Config,
    MixtralConfig,
    Qwen3_5TextConfig,
    T5Config,
)

from peftune.cli import main
from peftune.config.load import load
from peftune.config.schema import AdapterConfig
from peftune.data_check import check
from peftune.errors import ConfigError, ModelError, SelfCheckError
from peftune.model.assemble import count, weight_notes
from peftune.model.load_names import head_names
from peftune.parallel.host_memory import LIMIT
from tests.conftest import mostly_slow, summary, write_config
from tests.unit.test_model import assembled
from tests.unit.test_plan import watched_steps

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 256, "initializer_range": 0.1, "bos_token_id": 0,
                         "eos_token_id": 1, "pad_token_id": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
GEMMA3N = {**GROUPED, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "head_dim": 8, "laurel_rank": 4,
           "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]}
LLAMA4 = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
MAMBA2 = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8,
          "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
HYBRID = {**GROUPED, "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
LATENT = {**SIZES, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
          "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8}
TOKENS = {"image_token_id": 7, "boi_token_id": 8, "eoi_token_id": 9, "audio_token_id": 10, "video_token_id": 11}


@pytest.fixture
def family(decoder: str, tmp_path: Any) -> Callable[..., str]:
    """A config class and its fields -> the folder of such a model with random weights and the decoder's tokenizer."""

    def saved(config_class: Any, auto_class: Any = AutoModelForCausalLM, **fields: Any) -> str:
        tokenizer = AutoTokenizer.from_pretrained(decoder)
        torch.manual_seed(0)
        folder = tmp_path / config_class.model_type
        if "text_config" in fields:
            fields["text_config"] = {**fields["text_config"], "vocab_size": len(tokenizer)}
        else:
            fields["vocab_size"] = len(tokenizer)
        auto_class.from_config(config_class(**fields)).save_pretrained(folder)
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


@pytest.fixture
def gemma3(family) -> str:
    """A checkpoint that reads images too, as those of Gemma 3 from 4B on are."""
    return family(Gemma3Config, text_config={**GROUPED, "head_dim": 8}, vision_config=SIGHT, mm_tokens_per_image=4,
                  **{name: TOKENS[name] for name in ("image_token_id", "boi_token_id", "eoi_token_id")})


@pytest.mark.parametrize(("adapter", "taken", "left"), [
    (None, {"q_proj", "k_proj", "norm"}, set()), (AdapterConfig(r=2), {"q_proj", "k_proj", "down_proj"}, set()),
    (AdapterConfig(target_modules=["q_proj", "v_proj"]), {"q_proj", "v_proj"}, {"k_proj", "down_proj"}),
    (AdapterConfig(exclude_modules=["k_proj"]), {"q_proj", "down_proj"}, {"k_proj"}),
    (AdapterConfig(exclude_modules=".*k_proj"), {"q_proj", "down_proj"}, {"k_proj"})])
def test_of_a_checkpoint_that_reads_images_too_the_text_model_trains(adapter, taken, left, gemma3):
    model, loaded = assembled(gemma3, "causal_lm", adapter)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("language_model." in name for name in trained)
    parts = {part for name in trained for part in name.split(".")}
    assert taken <= parts and parts.isdisjoint(left)
    notes = weight_notes(loaded, count(model), "bfloat16")
    assert "no text passes through vision_tower, multi_modal_projector: not trained" in notes


@pytest.mark.parametrize("adapter", [None, {"method": "lora", "r": 2}], ids=["full", "lora"])
def test_a_checkpoint_that_reads_images_too_is_fine_tuned_on_text_and_saved_whole(adapter, gemma3, converse, train):
    folder = train({**converse, "adapter": adapter, "model": {"name_or_path": gemma3, "dtype": "float32"}})
    assert summary(folder)["reload_deviation"] <= 1e-4
    if adapter is None:
        assert_only_text_has_changed(gemma3, folder)


def assert_only_text_has_changed(before: str, folder: Any) -> None:
    old, new = load_file(f"{before}/model.safetensors"), load_file(folder / "final" / "model.safetensors")
    assert old.keys() == new.keys()
    equal = {name: torch.equal(new[name], tensor) for name, tensor in old.items()}
    assert all(equal[name] for name in equal if "vision" in name or "projector" in name) and not all(equal.values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_weights_that_no_text_passes_through_are_saved_where_ranks_divide_them(
    strategy, gemma3, converse, command, tmp_path
):
    settings = {**converse, "adapter": None, "model": {"name_or_path": gemma3, "dtype": "float32"}}
    done = command("-m", "peftune", "train", write_config(settings, tmp_path / "c"), "--strategy", strategy,
                   "--processes", "2", env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert_only_text_has_changed(gemma3, tmp_path / "run")


ODD = [(Gemma3nTextConfig, GEMMA3N, "correction_coefs, prediction_coefs"), (Llama4TextConfig, LLAMA4, "router"),
       (Mamba2Config, MAMBA2, "out_proj")]


@pytest.mark.parametrize(("config_class", "fields", "named"), ODD, ids=lambda value: getattr(value, "model_type", ""))
def test_all_linear_leaves_out_layers_that_are_in_other_hands_and_says_so(config_class, fields, named, family):
    path = family(config_class, **fields)
    model, loaded = assembled(path, "causal_lm", AdapterConfig(r=2))
    adapted = {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters()
               if ".lora_A." in name}
    assert adapted and adapted.isdisjoint(named.split(", "))
    assert f"no adapter can be beside {named}" in weight_notes(loaded, count(model), "bfloat16")
    spared = head_names(AutoModelForCausalLM, model.config, trust_remote_code=False)
    assert {name.rpartition(".")[2] for name in spared} >= set(named.split(", "))


@pytest.mark.parametrize(("config_class", "fields", "named"), mostly_slow(ODD, ODD[1]),
                         ids=lambda value: getattr(value, "model_type", ""))
def test_families_with_layers_in_other_hands_train_an_adapter(config_class, fields, named, family, converse, train):
    folder = train({**converse, "model": {"name_or_path": family(config_class, **fields), "dtype": "float32"}})
    assert summary(folder)["reload_deviation"] <= 1e-4


def test_experts_that_lie_in_one_tensor_are_said_to_be_left_out_unless_they_are_adapted(family):
    path = family(Llama4TextConfig, **LLAMA4)
    said = "experts hold down_proj, gate_up_proj in one tensor each"
    names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    for fields, expected in (({}, True), ({"target_parameters": names}, False)):
        model, loaded = assembled(path, "causal_lm", AdapterConfig(r=2, **fields))
        assert any(note.startswith(said) for note in weight_notes(loaded, count(model), "bfloat16")) == expected


def test_text_is_packed_where_a_tower_of_sound_knows_no_such_attention(family, converse, train, capsys):
    text = {**GROUPED, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400,
            "global_head_dim": 8}
    heard = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
    seen = {**{name: SIGHT[name] for name in SIGHT if name != "image_size"}, "head_dim": 16, "num_key_value_heads": 2}
    path = family(Gemma4Config, text_config=text, vision_config=seen, audio_config=heard, **TOKENS)
    folder = train({**converse, "model": {"name_or_path": path, "dtype": "float32"}})
    assert summary(folder)["reload_deviation"] <= 1e-4 and "a micro-batch, packed" in capsys.readouterr().out


@pytest.mark.parametrize(("config_class", "fields"), [
    (MixtralConfig, {**GROUPED, **ROUTED}), (Qwen3_5TextConfig, HYBRID), (Mamba2Config, MAMBA2),
    (DeepseekV3Config, LATENT)])
def test_memory_is_planned_of_experts_of_states_and_of_keys_wider_than_values(
    config_class, fields, family, converse, train, monkeypatch
):
    settings = {**converse, "model": {"name_or_path": family(config_class, **fields), "dtype": "float32"},
                "train": {"batch_size": 1000, "max_steps": 2, "tokens_per_micro_batch": 400}}
    with watched_steps(monkeypatch) as found:
        folder = train(settings, "data.layout=padded")
    planned = json.loads((folder / "manifest.json").read_text())["memory"]
    assert planned["predicted"], planned["why_not"]
    assert planned["predicted"]["instants"]["step"] == pytest.approx(max(found), rel=0.05)
    assert planned["predicted"]["instants"]["generation"] > 0


CTRL = {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}


def test_a_model_that_cannot_compute_its_activations_again_keeps_them_or_is_refused(family, converse, train,
                                                                                    monkeypatch):
    settings = {**converse, "adapter": None, "model": {"name_or_path": family(CTRLConfig, **CTRL), "dtype": "float32"}}
    monkeypatch.setenv(LIMIT, "1")
    assert not json.loads((train(settings) / "manifest.json").read_text())["model"]["gradient_checkpointing"]
    with pytest.raises(ConfigError, match="ctrl cannot compute its activations again"):
        train(settings, "model.gradient_checkpointing=true", name="asked")


def test_a_family_whose_next_token_layer_has_another_auto_class_trains_and_its_card_names_that_class(
    family, converse, train, tmp_path
):
    seen = {**SIGHT, "model_type": "pixtral", "head_dim": 16}
    path = family(Mistral3Config, AutoModelForImageTextToText, text_config={**GROUPED, "model_type": "mistral"},
                  vision_config=seen, image_token_index=7)
    folder = train({**converse, "model": {"name_or_path": path, "dtype": "float32"}})
    assert summary(folder)["reload_deviation"] <= 1e-4
    assert main(["export", str(folder), "--to", str(tmp_path / "merged"), "--merge"]) == 0
    for published in (folder / "final", tmp_path / "merged"):
        assert "model = AutoModelForImageTextToText.from_pretrained(" in (published / "README.md").read_text()


def test_a_family_without_an_output_layer_for_the_task_is_refused_before_anything_is_loaded(family, converse, tmp_path):
    path = family(T5Config, AutoModelForSeq2SeqLM, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    settings = {**converse, "model": {"name_or_path": path, "dtype": "float32"}}
    (fault,) = check(load([str(write_config(settings, tmp_path / "c"))])).faults
    assert fault.message.endswith("no output layer for causal_lm on models of the family t5")


def test_layers_that_the_task_does_not_read_are_left_out_as_the_self_check_says(family, tag, train):
    path = family(FNetConfig, AutoModelForMaskedLM, **SIZES)
    settings = {**tag, "model": {"name_or_path": path, "dtype": "float32"}, "data": {**tag["data"], "max_length": 200}}
    with pytest.raises(SelfCheckError) as refused:
        train(settings, name="all")
    (fault,) = refused.value.faults
    assert fault.mend == "adapter.exclude_modules=[pooler.dense]"
    train(settings, fault.mend)
    with pytest.raises(SelfCheckError) as refused:
        train({**settings, "adapter": None}, name="whole")
    assert "adapter.method=lora, adapter.exclude_modules" in refused.value.faults[0].mend


def test_a_model_whose_code_fails_in_bfloat16_is_refused_with_the_type_that_works(family, classify, train):
    path = family(FNetConfig, AutoModelForMaskedLM, **SIZES)
    settings = {**classify, "model": {"name_or_path": path}}
    with pytest.raises(ModelError, match="fails in it") as refused:
        train({**settings, "data": {**settings["data"], "max_length": 200}})
    assert refused.value.faults[0].mend == "model.dtype=float32"


def test_a_model_that_asks_for_marks_which_made_up_rows_lack_answers_questions_all_the_same(family, answer, train):
    path = family(LongformerConfig, AutoModelForMaskedLM, attention_window=[8, 8], sep_token_id=1,
                  **{**SIZES, "pad_token_id": 0})
    tokenizer = AutoTokenizer.from_pretrained(path, pad_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> </s> $B </s>", special_tokens=[("</s>", 1)])
    tokenizer.save_pretrained(path)
    folder = train({**answer, "adapter": None, "model": {"name_or_path": path, "dtype": "float32"},
                    "data": {**answer["data"], "max_length": 200, "doc_stride": 50}})
    assert summary(folder)["reload_deviation"] <= 1e-4


def test_what_a_model_s_own_code_freezes_stays_frozen_where_all_weights_train(family, converse, train):
    path = family(Ernie4_5_MoeConfig, **GROUPED, moe_intermediate_size=16, moe_num_experts=4, moe_k=2,
                  moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_interval=1)
    folder = train({**converse, "adapter": None, "model": {"name_or_path": path, "dtype": "float32"}})
    (bias,) = (name for name in load_file(f"{path}/model.safetensors") if "e_score_correction_bias" in name)
    old, new = (load_file(f"{where}/model.safetensors")[bias] for where in (path, folder / "final"))
    assert torch.equal(old, new) and summary(folder)["reload_deviation"] <= 1e-4


def test_experts_that_bitsandbytes_leaves_as_they_are_are_said(family):
    pytest.importorskip("bitsandbytes")
    path = family(MixtralConfig, **GROUPED, **ROUTED)
    model, loaded = assembled(path, "causal_lm", AdapterConfig(r=2), quantization="nf4")
    note = weight_notes(loaded, count(model), "bfloat16")[0]
    assert note.endswith("kept in nf4 but the experts' down_proj, gate_up_proj, which bitsandbytes leaves as they are")
