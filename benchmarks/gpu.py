"""All that is measured on a GPU, in one command, on a machine that may have no network.

    python -m benchmarks.gpu [--wheels FOLDER] [--only tests throughput ...] [--rows instructions.jsonl] [--repeats 1]
                             [--limit-s 3000] [--to FOLDER]
    python -m benchmarks.gpu --needs [--only tests throughput ...] [--python-version 3.12]

What the machine lacks of what the parts require is installed from the wheels in FOLDER, torch excepted; what still
lacks is named, and nothing is measured. `--needs` prints every package that the parts need, with its version here, so
that a machine with a network makes the folder, as benchmarks/README.md says; --python-version is the other machine's.
TRL takes part if it is there.

The parts run one after another, in processes of their own; one that fails does not stop the next, and one that has not
ended by --limit-s is ended. Results lie in benchmarks/results/<the GPU's name>/, or in --to. `throughput` and `peers`
write them after each cell: the same command given again goes on with those that lack one. The parts:

tests: tests/gpu. throughput: `peftune bench throughput gpu`. peers: `peftune bench peers llama-8b`, and 60m.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
NEEDED: Mapping[str, Sequence[str]] = {
    "tests": ("quantization", "pytest"), "throughput": ("quantization",), "peers": (), "peers-60m": ()}
"""The parts, and what they need beside what every run does: an extra of pyproject.toml, or the test runner."""
NOT_OURS = ("torch", "triton", "nvidia", "cuda")
"""Beginnings of packages that a machine with a GPU has, fitting its driver."""
CLEARING_S = 30
"""How long a part that was told to end may take, in seconds: it ends its training, and removes tens of GB."""


@dataclass(frozen=True, slots=True)
class Need:
    """A package that must be there."""

    asked: str
    """Its name, and all that is asked of its version."""
    version: str | None
    """Here, if it is here and fits."""


def requirements(names: Iterable[str]) -> list[Requirement]:
    """Of pyproject.toml: what every run needs, and what these parts need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    optional["pytest"] = [line for line in optional["dev"] if line.startswith("pytest")]
    extras = {extra for name in names for extra in NEEDED[name]}
    lines = [*project["dependencies"], *(line for extra in sorted(extras) for line in optional[extra])]
    return [Requirement(line) for line in lines]


def closure(wanted: Sequence[Requirement], python_version: str | None = None) -> dict[str, Need]:
    """Packages with all that they require, by name.

    Args:
        wanted: where to begin.
        python_version: such as 3.12, of the machine where they are to run; None is this one's.
    """
    asked: dict[str, SpecifierSet] = {}
    here: dict[str, str | None] = {}
    where = {"extra": ""}
    if python_version:
        where |= {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    waiting = list(wanted)
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name.startswith(NOT_OURS) or (one.marker and not one.marker.evaluate(where)):
            continue
        asked[name] = asked.get(name, SpecifierSet()) & one.specifier
        if name in here:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            here[name] = None
            continue
        here[name] = found.version
        waiting += [Requirement(line) for line in found.requires or ()]
    return {name: Need(f"{name}{asked[name]}",
                       version if version and asked[name].contains(version, prereleases=True) else None)
            for name, version in here.items()}


def install(wheels: Path, names: Iterable[str]) -> None:
    """What is missing or does not fit, from a folder; again, while that brings requirements of its own that are missing
    too."""
    tried: set[str] = set()
    while missing := {need.asked for need in closure(requirements(names)).values() if need.version is None} - tried:
        for asked in sorted(missing):
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
                            "--find-links", str(wheels), asked], check=False)
        tried |= missing
        importlib.invalidate_caches()


def parts(to: Path, rows: Path | None, repeats: int) -> Mapping[str, Sequence[str]]:
    """The command of each part, after this Python's name."""
    shared = ["--repeats", str(repeats), *(["--rows", str(rows)] if rows else [])]
    trl = ["--trl-python", sys.executable] if importlib.util.find_spec("trl") else []

    def bench(module: str, words: Sequence[str], name: str) -> list[str]:
        return ["-m", f"benchmarks.{module}", *words, "--to", str(to / f"{name}.json"),
                "--table", str(to / f"{name}.md")]

    return {"tests": ["-m", "pytest", "-q", "tests/gpu"],
            "throughput": bench("throughput", ["gpu", *shared], "throughput_gpu"),
            "peers": bench("peers", ["llama-8b", *shared, *trl], "peers_llama-8b"),
            "peers-60m": bench("peers", ["60m", *shared, *trl], "peers")}


def main() -> int:
    """Install, run the parts that are asked for, and say how each ended."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for what is missing here")
    parser.add_argument("--needs", action="store_true", help="print what a run needs, with versions, and end")
    parser.add_argument("--python-version", metavar="X.Y",
                        help="of the machine that --needs is for; default: this one's")
    parser.add_argument("--only", nargs="+", choices=list(NEEDED), default=list(NEEDED), help="default: all parts")
    parser.add_argument("--rows", type=Path, help='JSON lines of {"instruction", "input", "output"}; default: made up')
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=3000, help="of each part; default 3000")
    parser.add_argument("--to", type=Path, help="folder of results")
    asked = parser.parse_args()
    if asked.wheels:
        install(asked.wheels, asked.only)
    needed = closure(requirements(asked.only), asked.python_version if asked.needs else None)
    if asked.needs:
        print(*(f"{name}=={need.version}" if need.version else need.asked for name, need in sorted(needed.items())),
              sep="\n")
        return 0
    if missing := sorted(need.asked for need in needed.values() if need.version is None):
        print(f"missing here, or of a version that does not fit: {', '.join(missing)}\n"
              f"  mend: pip install {shlex.join(missing)}, or --wheels FOLDER", file=sys.stderr)
        return 2
    import torch  # late: what is missing is named without it

    if not torch.cuda.is_available():
        print("no GPU is seen here", file=sys.stderr)
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    to = (asked.to or ROOT / "benchmarks" / "results" / device).resolve()
    to.mkdir(parents=True, exist_ok=True)
    codes = {}
    for name, words in parts(to, asked.rows and asked.rows.resolve(), asked.repeats).items():
        if name in asked.only:
            started = time.perf_counter()
            codes[name] = _run(words, asked.limit_s)
            print(f"{name}: exit {codes[name]} after {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if any(codes.values()) else 0


def _run(words: Sequence[str], limit_s: float) -> int:
    from benchmarks.launches import ended  # late: what it imports may be missing when this file is read

    try:
        return ended([sys.executable, *words], cwd=ROOT, timeout=limit_s, grace_s=CLEARING_S).returncode
    except subprocess.TimeoutExpired:
        return 124


if __name__ == "__main__":
    sys.exit(main())
