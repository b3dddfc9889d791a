"""The text of a first config: few settings, each with a reason to look at it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftune.config.document import to_yaml
from peftune.starter.guess import Guess

ENCODER, DECODER = "bert-base-uncased", "Qwen/Qwen3-0.6B"


@dataclass(frozen=True, slots=True)
class Start:
    """Where a task begins. The rates are for LoRA; the configs that come with the project use like ones."""

    model: str
    dtype: str
    max_length: int
    batch_size: int
    num_epochs: int
    learning_rate: str


STARTS: Mapping[str, Start] = {
    "sequence_classification": Start(ENCODER, "float32", 512, 32, 5, "1.0e-3"),
    "token_classification": Start(ENCODER, "float32", 512, 16, 5, "1.0e-3"),
    "question_answering": Start(ENCODER, "float32", 384, 16, 5, "1.0e-3"),
    "causal_lm": Start(DECODER, "bfloat16", 1024, 16, 3, "2.0e-4"),
    "preference": Start(DECODER, "bfloat16", 1024, 8, 3, "2.0e-5"),
}

TEMPLATE = """\
# {about}
#   peftune check {name}     faults and oddities of the data, before anything is loaded
#   peftune train {name}
# These are the settings one changes first; `peftune schema` has all, with what they mean.
task: {task}
output_dir: {output_dir}

model:
  name_or_path: {model}    # a hub id, a folder, or package:<import name>/<folder>
  dtype: {dtype}    # of the frozen weights and the products: bfloat16 halves their memory, float32 suits old CPUs

adapter:                   # `adapter: null` trains all weights: then divide learning_rate by ten or more
  method: lora
  r: 16
  lora_alpha: 32

data:
  train: {train}
  validation: {validation}    # a share that is split off, or a file
  test: {test}    # a file that is scored once, at the end
{columns}{notes}  max_length: {max_length}    # tokens; what is longer is cut, and counted

train:
  batch_size: {batch_size}    # examples a step, over all devices
  num_epochs: {num_epochs}
  learning_rate: {learning_rate}
"""


def starting_config(
    name: str, found: Guess, *, about: str, output_dir: str, model: str | None, data: Mapping[str, Any]
) -> str:
    """The YAML text of a first config.

    Args:
        name: of the file it will be.
        found: what the data are.
        about: its first line.
        output_dir: of the runs.
        model: None takes a small one that suits the task.
        data: train, validation and test, as the config takes them.
    """
    start = STARTS[found.task]
    extra: dict[str, Any] = {"columns": found.columns} if found.columns else {}
    extra |= {"problem_type": found.problem} if found.problem != "auto" else {}
    return TEMPLATE.format(
        name=on_a_line(shlex.quote(name)), about=on_a_line(about), task=found.task, output_dir=in_yaml(output_dir),
        model=in_yaml(model or start.model), dtype=start.dtype, **{key: in_yaml(value) for key, value in data.items()},
        columns="".join(f"  {key}: {in_yaml(value)}\n" for key, value in extra.items()),
        notes="".join(f"  # {on_a_line(note)}\n" for note in found.notes),
        max_length=start.max_length, batch_size=start.batch_size, num_epochs=start.num_epochs,
        learning_rate=start.learning_rate)


def on_a_line(note: str) -> str:
    """Names of columns may hold what ends a line, or what a terminal obeys."""
    return "".join(letter if letter.isprintable() else " " for letter in note)


def in_yaml(value: Any) -> str:
    """A value on one line of YAML."""
    return to_yaml(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")


SECTIONS = ("task", "output_dir", "seed", "model", "adapter", "data", "train", "evaluation", "checkpoint", "log")


def nested_yaml(settings: Mapping[str, Any]) -> str:
    """Settings by their dotted keys as YAML, in the order of the schema's sections."""
    values: dict[str, Any] = {}
    for key in sorted(settings, key=lambda key: SECTIONS.index(key.partition(".")[0])):
        section, _, name = key.partition(".")
        if name:
            values.setdefault(section, {})[name] = settings[key]
        else:
            values[key] = settings[key]
    return to_yaml(values, width=120)
