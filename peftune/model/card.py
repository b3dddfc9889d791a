"""The model card that lies beside published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftune.model.folder import needs_config

KINDS = {
    "sequence_classification": ("text-classification", "AutoModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoModelForTokenClassification"),
    "question_answering": ("question-answering", "AutoModelForQuestionAnswering"),
    "causal_lm": ("text-generation", "AutoModelForCausalLM"),
    "preference": ("text-generation", "AutoModelForCausalLM"),
}
"""Task -> what model hubs call it, and the class that loads most of its models."""


def model_card(base: str, revision: str | None, task: str, method: str, facts: dict[str, Any]) -> str:
    """Markdown with the header that model hubs read."""
    adapter = method != "full fine-tuning"
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": KINDS[task][0],
        "tags": ["peftune", method.replace(" ", "-")],
    }
    if not is_local(base):
        header["base_model"] = base
    how = usage(adapter, task, facts["loads_with"], revision=revision, adds_tokens=facts["added_tokens"] > 0,
                quantised_by=facts["quantization"])
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {base}, {method} for {task}

Trained with peftune: {facts["trainable_parameters"]:,} of {facts["total_parameters"]:,} weights.
The run's `summary.json` and `report.html` hold its scores, `config.yaml` the settings to train it again.

```python
{how}
```
"""


def is_local(name: str) -> bool:
    """Whether a model's name is no hub id."""
    return name.startswith(("package:", "/", ".")) or Path(name).is_dir()


def usage(
    adapter: bool, task: str, auto_class: str, *, revision: str | None, adds_tokens: bool, quantised_by: dict[str, Any]
) -> str:
    """Python lines that load the folder.

    Args:
        adapter: it holds one, not a whole model.
        task: name of the task.
        auto_class: of transformers, which loads the model.
        revision: of the base model, where the run named one.
        adds_tokens: an adapter holds rows for tokens that its base lacks.
        quantised_by: arguments of BitsAndBytesConfig that the base was loaded with; none for a plain one.
    """
    if not adapter:
        return f"""from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")"""
    lines, names, arguments, grow = "", ["AutoTokenizer"], "", ""
    at = "" if revision is None else f", revision={revision!r}"
    if needs_config(task, adds_tokens=adds_tokens):
        names.append("AutoConfig")
        lines, arguments = "config = AutoConfig.from_pretrained(folder)\n", ", config=config"
    if adds_tokens:
        lines += f"rows, config.vocab_size = config.vocab_size, AutoConfig.from_pretrained(base{at}).vocab_size\n"
        grow = "\nmodel.resize_token_embeddings(rows)  # the adapter holds the rows of the added tokens"
    if quantised_by:
        names.append("BitsAndBytesConfig")
        lines += f"how = BitsAndBytesConfig(**{quantised_by})  # as the base was while the adapter trained\n"
        arguments += ", quantization_config=how"
    return f"""from peft import PeftConfig, PeftModel
from transformers import {", ".join(sorted((auto_class, *names)))}

folder = "THIS_FOLDER"
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
{lines}model = {auto_class}.from_pretrained(base{at}{arguments}){grow}
model = PeftModel.from_pretrained(model, folder)
tokenizer = AutoTokenizer.from_pretrained(folder)"""
