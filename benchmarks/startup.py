"""How long a person waits: for help, for the answer to a config fault, for a plan, for the first training step.

    python benchmarks/startup.py [--runs 10] [--to benchmarks/results/<device>/startup.json]

Whole processes, as a person starts them; one warm-up each; minimum, median and maximum in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peftune.errors import EXIT_DOES_NOT_FIT, EXIT_DONE, EXIT_MENDABLE
from peftune.observe.manifest import environment

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = """
from peftune.imports import without_search_for_garbage
with without_search_for_garbage():
    import peftune.plan.planning
"""
FAULTY = "task: causal_lm\nmodel: {name_or_path: m}\ndata: {train: t.jsonl}\ntrain: {lerning_rate: 1}\n"


def main() -> None:
    """Measure and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faulty = Path(folder) / "faulty.yaml"
        faulty.write_text(FAULTY)
        results = {
            "help_s": spread(lambda: wall_s("-m", "peftune.cli", "--help"), arguments.runs),
            "check_config_fault_s": spread(
                lambda: wall_s("-m", "peftune.cli", "check", str(faulty), code=EXIT_MENDABLE), arguments.runs),
            "imports_of_plan_s": spread(lambda: wall_s("-c", IMPORTS), arguments.runs),
            "plan_of_8b_that_fits_s": spread(lambda: plan_s("llama-3.1-8b", code=EXIT_DONE), arguments.runs),
            "plan_of_70b_that_does_not_s": spread(
                lambda: plan_s("llama-3.1-70b", "--devices", "8", code=EXIT_DOES_NOT_FIT), arguments.runs),
            "first_step_of_quickstart_s": spread(lambda: first_step_s(Path(folder)), max(3, arguments.runs // 3)),
        }
    outcome = {**environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")), "results": results}
    text = json.dumps(outcome, indent=2) + "\n"
    print(text)
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(text)


def spread(measure: Callable[[], float], runs: int) -> dict[str, float | int]:
    """Minimum, median and maximum of `runs` measurements after one that is not counted."""
    measure()
    values = [measure() for _ in range(runs)]
    return {"runs": runs, "min": min(values), "median": statistics.median(values), "max": max(values)}


def wall_s(*words: str, code: int = EXIT_DONE) -> float:
    """Seconds from start to end of a python process that ends with `code`."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    waited = time.perf_counter() - started
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}, not {code}:\n{done.stderr}")
    return waited


def plan_s(model: str, *words: str, code: int) -> float:
    """Seconds that `peftune plan` takes for LoRA on GPUs of 80 GB, from a model's shape alone."""
    return wall_s("-m", "peftune.cli", "plan", "benchmarks/models/plan.yaml", "--device", "h100-80gb",
                  f"model.name_or_path=benchmarks/models/{model}.json", *words, code=code)


def first_step_s(folder: Path) -> float:
    """Seconds from `accelerate launch` to the first row of metrics.jsonl that stands for a training step."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "peftune/train.py",
         "configs/quickstart.yaml", f"output_dir={run}", "train.max_steps=3", "log.every_steps=1"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = run / "metrics.jsonl"
    while process.poll() is None and not (rows.is_file() and '"split": "train"' in rows.read_text()):
        time.sleep(0.01)
    waited = time.perf_counter() - started
    assert process.wait() == 0
    return waited


if __name__ == "__main__":
    main()
