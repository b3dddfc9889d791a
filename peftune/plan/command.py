"""The command `peftune plan`. Its libraries wait until it runs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from peftune.imports import without_search_for_garbage
from peftune.parallel.names import STRATEGIES


def add_plan(commands: Any, sharing: str) -> None:
    """Add `peftune plan` with its options to the commands. `sharing`: help for devices that share sequences."""
    text = "memory by cause, what fits, and time, from the model's config alone"
    plan = commands.add_parser("plan", help=text, description=text)
    plan.set_defaults(command=_plan, takes_overrides=True)
    plan.add_argument("config", metavar="CONFIG")
    plan.add_argument("--device", metavar="NAME",
                      help="h100-80gb, a100-40gb, l4-24gb, ..., cpu; default: what this machine has")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="how many; default 1")
    plan.add_argument("--strategy", choices=STRATEGIES, help="default: single, or ddp on several devices")
    plan.add_argument("--sequence-parallel", type=int, default=1, metavar="N", help=sharing)
    plan.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _plan(parsed: argparse.Namespace) -> int:
    with without_search_for_garbage(), contextlib.redirect_stdout(sys.stderr):  # libraries log there when imported
        from peftune.plan.planning import planned

        text, code = planned([parsed.config, *parsed.overrides], parsed.device, parsed.devices, parsed.strategy,
                             parsed.sequence_parallel, json_wanted=parsed.json)
    print(text)
    return code
