"""lm-eval's tasks on a trained model, its adapter attached. The only file that knows lm-eval."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftune.config.schema import GENERATIVE
from peftune.errors import ConfigError, Fault, MachineError
from peftune.reopen import Trained

RUN_OPTIONS, TASK_OPTIONS = ("split", "output"), ("include_path", "batch_size", "limit")
"""Of `peftune evaluate`: for the rows of a config, and for lm-eval's tasks."""
BATCH_SIZE = 8


def refuse_idle(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of `peftune evaluate`, by name, that say nothing to what is scored."""
    idle, mend = (RUN_OPTIONS, "leave --tasks out") if options["tasks"] else (TASK_OPTIONS, "add --tasks NAME")
    said = [f"--{name.replace('_', '-')}" for name in idle if options[name] is not None]
    if said:
        how = "with" if options["tasks"] else "without"
        raise ConfigError(Fault(kind="config", message=f"{', '.join(said)}: not heeded {how} --tasks",
                                mend=f"leave it out, or {mend}"))


def check_harness(task: str, include: str | None, ranks: int) -> None:
    """Say before weights are loaded why lm-eval cannot run.

    Raises:
        MachineError: it is not installed, or several processes run.
        ConfigError: a task without a language model, or a folder that is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError(Fault(kind="environment", message="--tasks needs lm-eval, which is not installed",
                                 mend='pip install "lm-eval>=0.4.9,<0.5" (the extra `eval`)'))
    if ranks > 1:
        raise MachineError(Fault(kind="environment", message=f"--tasks runs in one process, not in {ranks}",
                                 mend="peftune evaluate ... --tasks ..., without a launcher"))
    if task not in GENERATIVE:
        raise ConfigError(Fault(kind="config", message=f"--tasks: lm-eval scores language models, not {task}",
                                mend="peftune evaluate RUN --split test"))
    if include is not None and not Path(include).is_dir():
        raise ConfigError(Fault(kind="config", file=include, message="--include-path is no folder",
                                mend="give the folder that holds the tasks' YAML files"))


def evaluate_tasks(
    trained: Trained, names: Sequence[str], include: str | None, *, batch_size: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Scores by task, with lm-eval's own names of metrics and standard errors.

    Args:
        trained: a language model; its adapter stays attached.
        names: lm-eval's tasks and groups.
        include: a folder of further tasks.
        batch_size: rows a forward pass; None takes 8.
        limit: rows of each task; None takes all.

    Raises:
        ConfigError: no such task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        mend = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks; --include-path adds your own"
        raise ConfigError(Fault(kind="config", message=f"lm-eval has no task {', '.join(unknown)}", mend=mend))
    rows = BATCH_SIZE if batch_size is None else batch_size
    model = HFLM(pretrained=trained.model, tokenizer=trained.text.tokenizer, batch_size=rows,
                 trust_remote_code=trained.config.model.trust_remote_code)
    with trained.evaluator.autocast():
        found = simple_evaluate(model=model, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
    return {name: {key: value for key, value in scores.items() if isinstance(value, int | float)}
            for name, scores in found["results"].items()}
