"""Exported folders in lm-eval, sentence-transformers and llama.cpp's converter. Skipped where these are missing."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftune import cli
from peftune.errors import guarded
from tests import tiny


@pytest.fixture
def chat_run(converse, train) -> Path:
    return train({**converse, "train": {**converse["train"], "max_steps": 6}})


@pytest.fixture
def own_task(tmp_path) -> Path:
    """Two tasks on local rows, as lm-eval's users write them: which answer is likeliest, and how likely the right one.
    """
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"question {n} about the badge?", "answer": n % 4, "choices": [
        " " + " ".join(tiny.NOUNS[(n + k * 3 + i) % len(tiny.NOUNS)] for i in range(2)) for k in range(4)]}
        for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "doc_to_text": "{{question}}",
              "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, changes in {
        "helpdesk_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
                            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "helpdesk_answer": {"output_type": "loglikelihood", "doc_to_target": "{{choices[answer]}}",
                            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}]},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **changes}))
    return folder


def run_json(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_lm_eval_gives_the_attached_adapter_the_scores_of_the_merged_folder(chat_run, own_task, capsys, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`: lm-eval")
    names, merged = ["helpdesk_choice", "helpdesk_answer"], tmp_path / "merged"
    base = yaml.safe_load((chat_run / "config.yaml").read_text())["model"]["name_or_path"]
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(own_task), include_defaults=False)

    def directly(folder: object) -> dict:
        return lm_eval.simple_evaluate(model="hf", model_args={"pretrained": str(folder), "dtype": "float32"},
                                       tasks=names, device="cpu", batch_size=8, task_manager=manager)["results"]

    ours = run_json(capsys, "evaluate", chat_run, "--tasks", ",".join(names), "--include-path", own_task,
                    "--json")["tasks"]
    assert cli.main(["export", str(chat_run), "--to", str(merged), "--merge"]) == 0
    theirs, before = directly(merged), directly(base)
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["helpdesk_choice"][metric] == theirs["helpdesk_choice"][metric]
    trained = ours["helpdesk_answer"]["perplexity,none"]
    assert trained == pytest.approx(theirs["helpdesk_answer"]["perplexity,none"], rel=1e-5)
    assert trained < 0.9 * before["helpdesk_answer"]["perplexity,none"]  # so a lost adapter would be seen


@pytest.mark.slow
def test_tasks_that_cannot_run_are_said_with_the_mend(chat_run, own_task, capsys, monkeypatch):
    import importlib.util

    words = ["evaluate", str(chat_run), "--tasks", "helpdesk_choise", "--include-path", str(own_task)]
    if importlib.util.find_spec("lm_eval") is None:
        assert guarded(cli.main, words) == 2
        assert "pip install" in capsys.readouterr().err
        return
    assert guarded(cli.main, words) == 2
    assert "helpdesk_choice" in capsys.readouterr().err
    assert guarded(cli.main, [*words[:-1], "/nowhere"]) == 2


def test_an_encoder_exported_merged_is_a_sentence_transformer(classify, train, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    merged = tmp_path / "merged"
    assert cli.main(["export", str(train(classify)), "--to", str(merged), "--merge"]) == 0
    vectors = library.SentenceTransformer(str(merged), device="cpu").encode(["the printer works", "the badge was lost"])
    assert vectors.shape == (2, 32)


def save_byte_fallback_decoder(folder: Path) -> str:
    """A tiny Llama whose tokenizer is of Llama 2's kind, the only one that the converter takes with any vocabulary."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = [turn["content"] for row in tiny.chat_rows(100) for turn in row["messages"]]
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                        pad_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=2)).save_pretrained(folder)
    return str(folder)


def test_a_gguf_file_holds_the_merged_weights(converse, train, capsys, tmp_path):
    reader = pytest.importorskip("gguf", reason="needs gguf")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("needs a checkout of llama.cpp, named by LLAMA_CPP")
    base = save_byte_fallback_decoder(tmp_path / "base")
    folder = train({**converse, "model": {"name_or_path": base, "dtype": "float32"}})
    record = run_json(capsys, "export", folder, "--to", tmp_path / "out", "--merge", "--gguf", "--json")
    assert record["checks"][-1]["what"].startswith("gguf") and record["checks"][-1]["deviation"] <= 1e-4
    tensors = {t.name: t for t in reader.GGUFReader(str(tmp_path / "out" / record["gguf"]["file"])).tensors}
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for theirs, ours in (("blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj.weight"),
                         ("token_embd.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")):
        assert torch.equal(torch.tensor(tensors[theirs].data).reshape(merged[ours].shape), merged[ours])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == merged["lm_head.weight"].shape[0]
