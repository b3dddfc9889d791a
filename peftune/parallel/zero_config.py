"""The DeepSpeed JSON of a run: what the launcher or the user gives, with its "auto" values filled in by peftune."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftune.errors import ConfigError, Fault
from peftune.parallel.names import DIVIDE_SEQUENCES

FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
"""Environment variable in which accelerate hands down the user's own file."""
OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_micro_batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.lr_scheduler",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}
"""Keys of the JSON that a run decides by its own config, and where."""
LARGEST_BUCKET = 50_000_000
SMALLEST_BUCKET = 500_000
LARGEST_LIVE = 1_000_000_000
"""Values exchanged at once, and gathered at once, at most: DeepSpeed's own. Small models get less, in proportion: with
these sizes ZeRO-3 would hold all of one at once, and divide nothing that matters."""
BUCKETS_OF_A_MODEL = 16
LIVE_PARTS_OF_A_MODEL = 4


def read_zero_config() -> dict[str, Any]:
    """The JSON as accelerate's DeepSpeed plugin understands its own settings and the user's file.

    Raises:
        ConfigError: the file cannot be read, decides what the run's own config decides, or has what DeepSpeed does not
            know.
    """
    file = os.environ.get(FILE, "none")
    if file != "none":
        _check(file)
    from accelerate.utils import DeepSpeedPlugin  # imports deepspeed

    try:
        config: dict[str, Any] = dict(DeepSpeedPlugin().deepspeed_config)
    except ValueError as error:  # its own checks of the file against the launcher's settings
        raise _fault(file, str(error).splitlines()[0], "leave zero_stage, the offload keys and mixed_precision out of "
                     "the accelerate config that names this file") from None
    return {key: value for key, value in config.items() if key not in OURS}


def _check(file: str) -> None:
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _fault(file, f"no DeepSpeed JSON: {error}", "give a file that json can read") from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise _fault(file, "has no section zero_optimization", 'write {"zero_optimization": {"stage": 2}}')
    zero = given["zero_optimization"]
    if zero.get("round_robin_gradients") is True and zero.get("stage") != 3:
        raise _fault(file, "zero_optimization.round_robin_gradients: DeepSpeed 0.19 then mistakes the gradient of one "
                     "weight for another's, and the run could not check itself", "write false, or leave it out")
    if zero.get("mics_shard_size", -1) != -1:
        raise _fault(file, "zero_optimization.mics_shard_size: saving knows weights that are divided among all devices "
                     "alone", "leave it out")
    if given.get("sequence_parallel_size", 1) != 1:
        raise _fault(file, f"sequence_parallel_size: {given['sequence_parallel_size']}: DeepSpeed divides no sequence "
                     "here, peftune does", f"leave it out, and {DIVIDE_SEQUENCES}")
    decided = [key for key in OURS if key in given and not _left_to_us(given[key])]
    if decided:
        raise ConfigError([Fault(kind="config", file=file, message=f"{key}: the run's own config decides this",
                                 mend=f'write "auto" or leave it out, and set {OURS[key]}') for key in decided])
    _check_keys(file, zero)


def _check_keys(file: str, zero: dict[str, Any]) -> None:
    """As DeepSpeed will, once the data is read and the model loaded."""
    from deepspeed.runtime.zero.config import get_zero_config

    try:
        get_zero_config({"zero_optimization": _without_nulls(zero)})
    except ValidationError as error:
        raise ConfigError([
            Fault(kind="config", file=file, message=f"{'.'.join(map(str, ('zero_optimization', *one['loc'])))}: "
                  f"{one['msg']}", mend="write it as DeepSpeed's documentation does, or leave it out")
            for one in error.errors()]) from None


def _without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in section.items()
            if value is not None}


def _left_to_us(value: Any) -> bool:
    """Whether a value decides nothing: "auto", or a section that is switched off or has only such values."""
    if isinstance(value, dict):
        return value.get("enabled") in (False, "auto") or all(_left_to_us(part) for part in value.values())
    return value in ("auto", None)


def stage_of(config: dict[str, Any]) -> int:
    """The ZeRO stage."""
    return int(config["zero_optimization"].get("stage", 0))


def offloads(config: dict[str, Any]) -> bool:
    """Whether optimizer state or weights live in host memory or on disk."""
    zero = config["zero_optimization"]
    return any(_device(zero.get(key)) not in ("none", None) for key in ("offload_optimizer", "offload_param"))


def _device(section: Any) -> str | None:
    return section.get("device") if isinstance(section, dict) else None


def filled(
    config: dict[str, Any], *, ranks: int, weights: int, on_cpu: bool, bfloat16: bool
) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    Args:
        config: from `read_zero_config`.
        ranks: processes.
        weights: values of the model, trained or not.
        on_cpu: no GPU takes part.
        bfloat16: products are computed in bfloat16 over float32 trainable weights, by torch's autocast.
    """
    bucket = min(LARGEST_BUCKET, max(SMALLEST_BUCKET, weights // BUCKETS_OF_A_MODEL))
    live = min(LARGEST_LIVE, max(SMALLEST_BUCKET, weights // LIVE_PARTS_OF_A_MODEL))
    auto = {
        "reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket, "allgather_bucket_size": LARGEST_BUCKET,
        "stage3_max_live_parameters": live, "stage3_max_reuse_distance": live, "stage3_param_persistence_threshold": 0,
        "overlap_comm": not on_cpu, "contiguous_gradients": True,
    }
    given = _without_nulls(config["zero_optimization"])
    zero = auto | {key: value for key, value in given.items() if value != "auto" or key not in auto}
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key, {})
        if section.get("device") in (None, "none"):
            zero.pop(key, None)
        else:
            zero[key] = {"pin_memory": not on_cpu, **section}
    return {
        **config,
        "zero_optimization": zero,
        # the loop says which micro-batch is a step's last; DeepSpeed must only know that there may be several
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "train_batch_size": 2 * ranks,
        "gradient_clipping": 0.0,  # set at each step, by `Zero.clip`
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "wall_clock_breakdown": False,
    }


def _fault(file: str, message: str, mend: str) -> ConfigError:
    return ConfigError(Fault(kind="config", file=file, message=message, mend=mend))
