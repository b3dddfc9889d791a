"""Does LoRA reach full fine-tuning? MiniLM on classification sets, through the true command.

    peftune bench lora_vs_full DATA_FOLDER [DATA_FOLDER ...] [--epochs 2] [--lora adapter.r=128] [--to results.json]

A folder holds train.jsonl and validation.jsonl with text and label. LoRA and all weights run at learning rates of their
own, equal in everything else: a method is judged at the better of its rates. The scores are those of summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from peftune.observe.manifest import environment

ROOT = Path(__file__).resolve().parents[1]
RATES = {"lora": ("2e-3", "3e-3"), "full": ("3e-4", "5e-4")}


def main() -> None:
    """Run every folder with every method and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of every run")
    parser.add_argument("--lora", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of LoRA alone")
    parser.add_argument("--lora-rates", nargs="*", default=RATES["lora"], metavar="RATE")
    parser.add_argument("--full-rates", nargs="*", default=RATES["full"], metavar="RATE")
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    methods = {"lora": arguments.lora, "full": ["adapter=null"]}
    results = {}
    for folder in arguments.folders:
        for method, rates in (("lora", arguments.lora_rates), ("full", arguments.full_rates)):
            for rate in rates:
                found = one_run(folder, rate, arguments.epochs, [*methods[method], *arguments.set])
                results[f"{folder.name}/{method}/{rate}"] = found
                print(folder.name, method, rate, json.dumps(found), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = json.dumps({**environment(device), "epochs": arguments.epochs, "settings": arguments.set,
                       "methods": methods, "results": results}, indent=2) + "\n"
    if arguments.to:
        arguments.to.parent.mkdir(parents=True, exist_ok=True)
        arguments.to.write_text(text)


def one_run(data: Path, rate: str, epochs: float, settings: list[str]) -> dict[str, object]:
    """Train and return the validation scores of the last weights. No speed: nothing is repeated or kept quiet here."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", str(ROOT / "peftune" / "train.py"),
             str(ROOT / "configs" / "quickstart.yaml"), f"output_dir={run}", f"data.train={data / 'train.jsonl'}",
             f"data.validation={data / 'validation.jsonl'}", "data.test=null", "data.max_length=64",
             f"train.num_epochs={epochs}", f"train.learning_rate={rate}",
             "log.trackers=[]", *settings],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "summary.json").read_text())
    kept = ("steps", "peak_memory_bytes", "trainable_parameters")
    return {**{key: summary[key] for key in kept}, **summary["metrics"]["validation"],
            "untrained_accuracy": summary["baseline"]["validation"]["accuracy"],
            "majority_accuracy": summary["majority"]["validation"]["accuracy"]}


if __name__ == "__main__":
    main()
