"""transformers' Trainer with peft on the same rows: python benchmarks/peers/hf_trainer.py JOB.json"""

from __future__ import annotations

import torch
from measured import Measured, finish, job, rows_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

order = job()
rows, tokenizer = rows_of(order["train"]), AutoTokenizer.from_pretrained(order["model"])
torch.manual_seed(0)
if order["task"] == "causal_lm":
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
    collator, kind = DataCollatorForSeq2Seq(tokenizer), "CAUSAL_LM"
else:
    classes = 1 + max(row["label"] for row in rows)
    model = AutoModelForSequenceClassification.from_pretrained(
        order["model"], num_labels=classes, dtype=torch.bfloat16, attn_implementation="sdpa",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    collator, kind = DataCollatorWithPadding(tokenizer), "SEQ_CLS"
model.config.use_cache = False
model = get_peft_model(model, LoraConfig(task_type=kind, **order["adapter"]))
clock = Measured(model)
Trainer(
    model=model, train_dataset=rows, data_collator=collator, callbacks=[clock],
    args=TrainingArguments(
        output_dir=order["to"] + ".run", per_device_train_batch_size=order["rows_a_micro_batch"],
        gradient_accumulation_steps=order["examples_a_step"] // order["rows_a_micro_batch"], max_steps=order["steps"],
        learning_rate=order["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        bf16=True, train_sampling_strategy=order["sampling"], seed=0, logging_steps=order["steps"], report_to="none",
        save_strategy="no", gradient_checkpointing=order["recompute"], disable_tqdm=True, remove_unused_columns=False,
        torch_compile=order.get("compile", False), use_cpu=not torch.cuda.is_available()),
).train()
finish(order, model, clock)
