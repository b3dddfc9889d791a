"""The model card that lies beside published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "question_answering": ("question-answering", "AutoModelForQuestionAnswering"),
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "preference": ("text-generation", "AutoModelForCausalLM"),
}
"""Task -> what model hubs call it, and the class that loads most of its models."""


def model_card(base: str, task: str, method: str, facts: dict[str, Any]) -> str:
    """Markdown with the header that model hubs read."""
    adapter = method != "full fine-tuning"
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": KINDS[task][0],
        "tags": ["peftune", method.replace(" ", "-")],
    }
    if not is_local(base):
        header["base_model"] = base
    auto_class = facts["loads_with"]
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {base}, {method} for {task}

Trained with peftune: {facts["trainable_parameters"]:,} of {facts["total_parameters"]:,} weights.
The run's `summary.json` and `report.html` hold its scores, `config.yaml` the settings to train it again.

```python
{usage(adapter, auto_class, adds_tokens=bool(facts.get("added_tokens")), quantised_by=facts["quantization"])}
```
"""


def is_local(name: str) -> bool:
    """Whether a model's name is no hub id."""
    return name.startswith(("package:", "/", ".")) or Path(name).is_dir()


def usage(adapter: bool, auto_class: str, *, adds_tokens: bool, quantised_by: dict[str, Any]) -> str:
    """Python lines that load the folder. `adds_tokens`: an adapter holds rows for tokens that its base lacks.
    `quantised_by`: arguments of BitsAndBytesConfig that the base was loaded with; none for a plain one."""
    if not adapter:
        return f"""from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")"""
    own_size = grow = how = name = argument = ""
    if adds_tokens:
        own_size = "\nrows, config.vocab_size = config.vocab_size, AutoConfig.from_pretrained(base).vocab_size"
        grow = "\nmodel.resize_token_embeddings(rows)  # the adapter holds the rows of the added tokens"
    if quantised_by:
        how = f"how = BitsAndBytesConfig(**{quantised_by})  # as the base was while the adapter trained\n"
        name, argument = ", BitsAndBytesConfig", ", quantization_config=how"
    return f"""from peft import PeftConfig, PeftModel
from transformers import AutoConfig, {auto_class}, AutoTokenizer{name}

folder = "THIS_FOLDER"
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
config = AutoConfig.from_pretrained(folder){own_size}
{how}model = {auto_class}.from_pretrained(base, config=config{argument}){grow}
model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
