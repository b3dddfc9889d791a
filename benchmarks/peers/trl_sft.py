"""TRL's SFTTrainer on the same rows: python benchmarks/peers/trl_sft.py JOB.json, in an environment of its own

Packing is TRL's own (best-fit decreasing, borders in the position ids, which SDPA's mask respects). A packed row is one
of its rows, so rows a micro-batch and micro-batches a step are chosen for as many tokens a step as the others see.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from measured import Measured, finish, job, rows_of
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

order = job()
tokenizer = AutoTokenizer.from_pretrained(order["model"])
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
model.config.use_cache = False
trainer = SFTTrainer(
    model=model, train_dataset=Dataset.from_list(rows_of(order["train"])), processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", **order["adapter"]),
    args=SFTConfig(
        output_dir=order["to"] + ".run", per_device_train_batch_size=order["rows_a_micro_batch"],
        gradient_accumulation_steps=max(1, round(order["examples_a_step"] / order["rows_a_micro_batch"])),
        max_steps=order["steps"], learning_rate=order["learning_rate"], lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=1.0, bf16=True, gradient_checkpointing=order["recompute"], packing=order["packing"],
        max_length=order["max_length"], seed=0, logging_steps=order["steps"], report_to="none", save_strategy="no",
        disable_tqdm=True, use_cpu=not torch.cuda.is_available()),
)
clock = Measured(trainer.model)
trainer.add_callback(clock)
trainer.train()
finish(order, trainer.model, clock)
