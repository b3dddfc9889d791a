"""Every setting of a run: frozen values, checked whole before any weight is loaded."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from peftune.config.document import method_of

TaskName = Literal[
    "sequence_classification", "token_classification", "question_answering", "causal_lm", "preference"
]
GENERATIVE = ("causal_lm", "preference")
"""Tasks of language models."""


class Section(BaseModel):
    """A part of the config. Frozen; unknown keys are faults; the docstrings are the schema's descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_another_value(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("another value than true or false")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any, True, False) or any(map(_takes_bool, get_args(annotation)))


class ModelConfig(Section):
    """Which model, and in what form it is held in memory."""

    name_or_path: str = Field(min_length=1)
    """Hub id, local folder, or `package:<import name>/<folder>` for weights inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen weights and of the matrix products. Trainable weights are float32 in either case."""
    pure_bf16: bool = False
    """Keep the trainable weights in bfloat16 too: half their memory, small updates may round away."""
    quantization: Literal["none", "int8", "nf4", "fp4"] = "none"
    """bitsandbytes storage of the frozen weights."""
    attention: str = "auto"
    """auto | sdpa | eager | flash_attention_2 | any name that transformers knows."""
    dropout: float | None = Field(default=0.0, ge=0, lt=1)
    """Rate of the model's own dropout. 0 makes a run independent of the device layout; null keeps the checkpoint's."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in backward instead of keeping them. auto: only when they would not fit."""
    reuse_frozen_layers: bool = True
    """Compute what the layers below the first trained one give for each example once, and read it from disk in later
    epochs: with one process and dropout 0, where it is proven to change nothing."""
    compile: Literal["parts"] | bool = False
    """Use torch.compile. parts: for what lies between products of matrices (norms, gates, rotary positions), which then
    touches memory once. true: for the whole model, with padded rows and without what else makes steps lean."""
    added_tokens: tuple[str, ...] = ()
    """Tokens to teach the model: added to the tokenizer, each with a row of the embeddings that begins as the mean of
    the others and trains."""
    added_special_tokens: tuple[str, ...] = ()
    """The same for marks that are no text: they are left out of generated answers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    @property
    def compiles_whole(self) -> bool:
        """Whether torch.compile gets the model in one piece."""
        return self.compile is True


class AdapterConfig(BaseModel):
    """A PEFT method. The other keys are that method's own PEFT config fields, passed through unchanged."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Annotated[str, AfterValidator(str.lower)] = "lora"
    """lora, ia3, vera, adalora, oft, prefix_tuning, ... : any PEFT type."""
    init_from: str | None = None
    """Run or folder of an earlier adapter that this run trains on; its fields come with it."""
    stack_on: str | None = None
    """Run or folder of an earlier LoRA that stays as it is beneath the new one. Both are saved as one LoRA."""

    @model_validator(mode="before")
    @classmethod
    def _with_lora_defaults(cls, values: Any) -> Any:
        """LoRA's defaults here; other methods keep PEFT's own, and an earlier adapter brings its values."""
        if isinstance(values, dict) and method_of(values) == "lora" and not values.get("init_from"):
            return {"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear",
                    **values}
        return values

    @property
    def fields(self) -> dict[str, Any]:
        """The PEFT config's fields."""
        return dict(self.model_extra or {})

    @property
    def start(self) -> str:
        """`init_lora_weights`, in lower case."""
        return str(self.fields.get("init_lora_weights", "")).lower()


class Source(Section):
    """One of several data sources that are mixed."""

    path: str = Field(min_length=1)
    """File, glob, folder or hub id."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    weight: PositiveFloat = 1.0
    """How often each row is seen in an epoch: 2 is twice, 0.5 a random half (another half each epoch)."""
    streaming: bool = False
    """Hub data sets: read row by row, without keeping a copy of the set on disk."""
    shuffle_buffer: PositiveInt | None = None
    """Streaming: rows among which the next one is drawn before `max_rows` cuts; null keeps the set's order."""
    max_rows: PositiveInt | None = None
    """Read no more rows than this; null reads all."""


Named = Annotated[str, Field(min_length=1)]
Sources = Named | Annotated[tuple[Named | Source, ...], Field(min_length=1)]


class DataConfig(Section):
    """What is read, and how a row becomes tokens."""

    train: Sources
    """File, glob, folder, hub id, or a list of them or of {path, split, weight}."""
    validation: float | Sources | None = 0.1
    """Held-out data, a fraction split off the training rows by content hash and seed, or null."""
    test: Sources | None = None
    """Data scored once, at the end."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "classification", "ner", "squad",
        "preference",
    ] = "auto"
    """Shape of a row. auto: found from the columns, and said."""
    columns: dict[str, str] = {}
    """Renames, as {expected name: name in the file}."""
    labels: tuple[str, ...] | None = None
    """Class names in order. null: the sorted labels of the training rows."""
    problem_type: Literal["auto", "single_label", "multi_label", "regression"] = "auto"
    """Kind of label. auto: lists are multi_label, fractions are regression, all else single_label."""
    max_length: PositiveInt = 512
    """Tokens an example may have."""
    too_long: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What happens to a longer one. split: plain text goes on in further examples. Counted and shown in every case."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that is broken or does not fit its format: stop and say all of them, or leave them out and count them."""
    doc_stride: PositiveInt | None = None
    """question_answering: tokens that neighbouring windows of a long context share; null: 128, or a third of
    `max_length` where that is less."""
    subtokens: Literal["first", "all"] = "first"
    """token_classification: which sub-tokens of a word are in the loss."""
    layout: Literal["auto", "padded", "packed"] = "auto"
    """How the examples of a step lie in memory. Never changes which examples a step sees. auto: packed where the
    model's attention is proven, before the first step, to keep examples apart."""
    train_on: Literal["completion", "last_turn", "all"] = "completion"
    """causal_lm: tokens in the loss: those of completions and assistant turns, of the last such turn, or all."""
    chat_template: str | None = None
    """chatml, a Jinja file, or Jinja text. null: the tokenizer's own."""


class TrainConfig(Section):
    """What a step is, and how many there are."""

    batch_size: PositiveInt = 32
    """Examples per optimizer step over all devices. The hardware never changes it."""
    tokens_per_micro_batch: Literal["auto"] | PositiveInt = "auto"
    """Padded tokens a device holds at once: a memory knob that never changes the result."""
    num_epochs: PositiveFloat = 3.0
    """Passes over the training data; fractions allowed."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides num_epochs."""
    learning_rate: PositiveFloat = 2.0e-4
    """Peak learning rate."""
    lr_scheduler: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from zero."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimizer over the trainable weights. sgd has a momentum of 0.9."""
    lora_plus_ratio: float | None = Field(default=None, ge=1)
    """LoRA+ (arXiv:2402.12354): how many times faster than A the matrices B learn. null is 1; the paper takes 16."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (sgd: part of the gradient); spares biases, norms and all else of one dimension."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Bound on the global gradient norm; null clips nothing."""
    max_skipped_steps: NonNegativeInt = 3
    """Steps in a row that may be left out because their loss or gradient is not finite; one more ends the run."""
    dpo_beta: PositiveFloat = 0.1
    """preference: strength of the tie to the reference model."""


class EvaluationConfig(Section):
    """When and on what the model is scored."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations. null: each epoch."""
    metric: str | None = None
    """The metric that picks `best`. null: the task's usual one."""
    patience: PositiveInt | None = None
    """Evaluations without a better metric before training stops early."""
    max_new_tokens: NonNegativeInt = 128
    """causal_lm: tokens generated per example for generation metrics; 0 generates nothing."""
    n_best: PositiveInt = 20
    """question_answering: answers kept per question, with their scores."""
    max_answer_tokens: PositiveInt = 30
    """question_answering: longest answer that is looked for."""
    no_answer_threshold: float = 0.0
    """question_answering: no answer is given where its score exceeds the best span's by more than this."""


class CheckpointConfig(Section):
    """What is kept so that the run can continue."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints. null: each epoch."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    asynchronous: Literal["auto"] | bool = "auto"
    """Copy what is to be saved, and write it while training goes on. auto: where a rank holds more than 64 MiB of it
    and the host has twice that free (on CPUs beside a step). The last checkpoint is always waited for."""


class LogConfig(Section):
    """What is written while training. metrics.jsonl is always written."""

    every_steps: PositiveInt = 10
    """Steps a log row stands for."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of accelerate's trackers: tensorboard, wandb, mlflow, ..."""


def seconds_of(duration: str) -> int:
    """3h55m, 90m or 45s in seconds. Raises ValueError for anything else."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    seconds = sum(int(number or 0) * unit for number, unit in zip(found.groups(), (3600, 60, 1))) if found else 0
    if not seconds:
        raise ValueError("3h55m, 90m or 45s")
    return seconds


Duration = Annotated[str, AfterValidator(lambda text: seconds_of(text) and text)]


class RunConfig(Section):
    """A whole run."""

    task: TaskName
    """What is learned."""
    output_dir: str = Field(default="runs/default", min_length=1)
    """The run folder; all that a run writes lies there."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the order of the data, the split, and every newly initialised weight."""
    resume: str = "auto"
    """auto (continue if the folder holds this run) | never | a checkpoint folder."""
    deadline: Duration | None = None
    """Time from the command's start, as 3h55m, 90m or 45s, before which the run saves and ends with exit code 75; null
    has none. Time for the checkpoint is left as measured."""
    hang_timeout: Duration | None = "10m"
    """Several processes: how long all of them may stand still, or one may be silent, before the run ends and names the
    late one. A step's micro-batch, an evaluation's batch or a generated token must take less; null waits."""
    model: ModelConfig
    adapter: AdapterConfig | None = AdapterConfig()
    """null fine-tunes all weights."""
    data: DataConfig
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def deadline_s(self) -> int | None:
        """In seconds."""
        return None if self.deadline is None else seconds_of(self.deadline)

    @property
    def hang_timeout_s(self) -> int | None:
        """In seconds."""
        return None if self.hang_timeout is None else seconds_of(self.hang_timeout)
