"""What PEFT methods, or some of their fields, cannot do: the reason and the nearest that works."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from peft import AdaLoraConfig, LoraConfig, OFTConfig, PeftConfig, PromptLearningConfig

from peftune.config.refusal import Refusal
from peftune.config.schema import GENERATIVE, AdapterConfig


@dataclass(frozen=True, slots=True)
class Asked:
    """An adapter section and the task it is for."""

    adapter: AdapterConfig
    config_class: type[PeftConfig]
    values: dict[str, Any]
    """Its PEFT fields."""
    task: str
    adds_tokens: bool

    @property
    def method(self) -> str:
        """Its name."""
        return self.adapter.method

    @property
    def start(self) -> str:
        """`init_lora_weights`, in lower case."""
        return self.adapter.start

    def has(self, field: str) -> bool:
        """Whether the method has such a field."""
        return field in {known.name for known in fields(self.config_class)}


SHIFTING = frozenset({"prompt_tuning", "p_tuning", "multitask_prompt_tuning", "cpt"})
"""Methods that put a prompt in front of the text, so that outputs of tokens move."""
LENGTH_IS_GIVEN = frozenset({"prompt_tuning", "p_tuning", "prefix_tuning"})
"""Methods whose prompt is as long as the config says."""
FINISHED = "give a folder in model.name_or_path that has the earlier adapter merged (peftune export --merge)"


def takes_factors(start: object) -> bool:
    """Whether a LoRA begins with factors of the weights (PiSSA, OLoRA)."""
    return isinstance(start, str) and (start.lower() == "olora" or start.lower().startswith("pissa"))


def _is_lora(asked: Asked) -> bool:
    return asked.config_class is LoraConfig


def _joins(asked: Asked) -> bool:
    """Whether a second LoRA lies beneath the trained one, and both are saved as one."""
    return _is_lora(asked) and (takes_factors(asked.start) or asked.adapter.stack_on is not None)


def _is_no_count(asked: Asked, field: str, least: int) -> bool:
    """Whether a field has a value that is no whole number of `least` at least."""
    value = asked.values.get(field)
    return value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least)


def _names_no_tokens(asked: Asked) -> bool:
    """Whether aLoRA is asked for, by something that is no list of ids."""
    ids = asked.values.get("alora_invocation_tokens")
    listed = isinstance(ids, list | tuple) and len(ids) > 0
    return ids is not None and not (listed and all(type(one) is int for one in ids))


def _lacks_prompt(asked: Asked) -> bool:
    return asked.method in LENGTH_IS_GIVEN and asked.adapter.init_from is None and not (
        asked.values.get("num_virtual_tokens"))


LIMITS: tuple[Refusal[Asked], ...] = (
    Refusal(
        "peft_type", lambda a: "peft_type" in a.values,
        "adapter.method names the method", "adapter.method with that name, and leave adapter.peft_type out",
    ),
    Refusal("task_type", lambda a: "task_type" in a.values, "task says it for the whole run", "leave it out"),
    Refusal(
        "inference_mode", lambda a: bool(a.values.get("inference_mode")),
        "the adapter would be frozen, and nothing would train", "leave it out",
    ),
    Refusal(
        "method", lambda a: a.method == "xlora",
        "it mixes adapters that are trained already, by a pass of the model before each pass", "adapter.method=lora",
    ),
    Refusal(
        "method", lambda a: a.method == "poly",
        "it needs the number of a task beside each example's text, which no format here gives", "adapter.method=lora",
    ),
    Refusal(
        "r", lambda a: a.has("r") and _is_no_count(a, "r", 0 if a.config_class is OFTConfig else 1),
        "a rank is a whole number, and 1 at least", "adapter.r=16",
    ),
    Refusal(
        "alora_invocation_tokens", _names_no_tokens,
        "the tokens behind which the adapter works are a list of their ids, one at least",
        "their ids as the model's tokenizer has them, such as [151644, 77091]",
    ),
    Refusal(
        "num_virtual_tokens", lambda a: _lacks_prompt(a) or _is_no_count(a, "num_virtual_tokens", 1),
        "the length of the prompt is a whole number, and 1 at least", "adapter.num_virtual_tokens=20",
    ),
    Refusal(
        "method", lambda a: a.method in SHIFTING and a.task in ("token_classification", "question_answering"),
        "a prompt in front of the text moves the outputs of its tokens away from their labels",
        "adapter.method=prefix_tuning, whose prompt lies in the attention, or lora",
    ),
    Refusal(
        "method", lambda a: not a.has("modules_to_save") and not issubclass(a.config_class, PromptLearningConfig)
        and a.task not in GENERATIVE,
        "this method cannot train an output layer beside it", "adapter.method=lora",
    ),
    Refusal(
        "method", lambda a: a.adds_tokens and not a.has("trainable_token_indices") and a.adapter.init_from is None,
        "this method cannot train rows of the embeddings for model.added_tokens",
        "adapter.method=lora, or adapter=null",
    ),
    Refusal(
        "method", lambda a: a.task == "causal_lm" and a.method in ("cpt", "multitask_prompt_tuning"),
        "it needs ids of its own beside each example's text, which no format here gives",
        "adapter.method=prompt_tuning",
    ),
    Refusal(  # peft 0.21. Delete this with a peft whose AdaptionPromptModel sets requires_grad
        "method", lambda a: a.method == "adaption_prompt",
        "PEFT reads none back to train on, nor a second one, by which a run compares what it has saved",
        "adapter.method=prefix_tuning",
    ),
    Refusal(
        "total_step", lambda a: a.config_class is AdaLoraConfig and "total_step" in a.values,
        "the run knows its steps", "leave it out",
    ),
    Refusal(
        "use_dora", lambda a: bool(a.values.get("use_dora")) and _joins(a),
        "DoRA scales the sum of weight and adapter, so nothing can be added to it or taken back from it afterwards",
        "adapter.use_dora=false",
    ),
    Refusal(
        "lora_bias", lambda a: bool(a.values.get("lora_bias")) and _joins(a),
        "a bias of B cannot be joined with the adapter beneath", "adapter.lora_bias=false",
    ),
    Refusal(
        "bias", lambda a: a.values.get("bias", "none") != "none" and _joins(a),
        "PEFT takes no second adapter beside one that trains biases of the base", "adapter.bias=none",
    ),
    Refusal(
        "bias", lambda a: a.values.get("bias", "none") != "none" and a.task == "preference",
        "the reference is the model without its adapter, which would keep the trained biases", "adapter.bias=none",
    ),
    Refusal(
        "init_lora_weights", lambda a: a.start in ("corda", "lora_ga"),
        "it needs statistics that PEFT gathers in steps of their own before, and writes into the base weights",
        "adapter.init_lora_weights=eva, which reads the data too, or pissa",
    ),
    Refusal(
        "init_lora_weights", lambda a: a.start == "loftq" and a.has("init_lora_weights") and not _is_lora(a),
        "only LoRA starts from what quantisation has rounded away", "adapter.method=lora",
    ),
    Refusal(
        "init_lora_weights", lambda a: a.start == "loftq" and bool(a.values.get("use_dora")),
        "DoRA's magnitudes are those of the rounded weights", "adapter.use_dora=false",
    ),
    Refusal(
        "init_lora_weights", lambda a: a.start == "loftq" and a.task == "preference",
        "the reference is the model without its adapter, which would lack what was rounded away",
        "adapter.init_lora_weights=true",
    ),
    Refusal(
        "stack_on", lambda a: a.adapter.stack_on is not None and not _is_lora(a),
        "only LoRA can be saved as one with a LoRA beneath it", f"adapter.method=lora, or {FINISHED}",
    ),
    Refusal(
        "stack_on", lambda a: a.adapter.stack_on is not None
        and (takes_factors(a.start) or a.start == "loftq"),
        "PiSSA, OLoRA and LoftQ keep their own start there", f"adapter.init_lora_weights=true, or {FINISHED}",
    ),
    Refusal(
        "stack_on", lambda a: a.adapter.stack_on is not None and a.adapter.init_from is not None,
        "an adapter is either trained on or laid beneath", "leave one of adapter.init_from and adapter.stack_on out",
    ),
    Refusal(
        "init_from", lambda a: a.task == "preference" and (a.adapter.init_from or a.adapter.stack_on) is not None,
        "the reference is the model without any adapter, not the earlier one's", FINISHED,
    ),
)
