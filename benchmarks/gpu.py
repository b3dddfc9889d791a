"""All that is measured on a GPU, in one command, on a machine that may have no network.

    python -m benchmarks.gpu [--wheels FOLDER] [--only tests throughput ...] [--rows instructions.jsonl] [--repeats 1]
                             [--limit-s 3000] [--to FOLDER]
    python -m benchmarks.gpu --needs

What the machine lacks of peftune's own requirements is installed from the wheels in FOLDER, torch excepted; what still
lacks is named, and nothing is measured. `--needs` prints every package that a run needs, with its version here, so
that a machine with a network makes the folder: `pip wheel --no-deps -w FOLDER NAME==VERSION ...`, for deepspeed with
DS_BUILD_OPS=0. TRL takes part if it is there.

The parts run one after another, in processes of their own; one that fails does not stop the next, and one that has not
ended by --limit-s is ended. Results lie in benchmarks/results/<the GPU's name>/, or in --to. `throughput` and `peers`
write them after each cell: the same command given again goes on with those that lack one. The parts:

tests: tests/gpu. throughput: `peftune bench throughput gpu`. peers: `peftune bench peers llama-8b`, and 60m.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("hub", "deepspeed", "quantization")
NOT_OURS = ("torch", "triton", "nvidia", "cuda")
"""Beginnings of packages that a machine with a GPU has, fitting its driver."""


def requirements() -> list[Requirement]:
    """Of pyproject.toml: what every run needs, what the measured ones need, and the test runner."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra]),
             *(line for line in optional["dev"] if line.startswith("pytest"))]
    return [Requirement(line) for line in lines]


def closure(wanted: Sequence[Requirement]) -> dict[str, str | None]:
    """Packages with all that they require, by name: the version here, or None where one is missing or does not fit."""
    found: dict[str, str | None] = {}
    waiting = list(wanted)
    while waiting:
        one = waiting.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found or name.startswith(NOT_OURS) or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            continue
        found[name] = here.version if one.specifier.contains(here.version, prereleases=True) else None
        waiting += [Requirement(line) for line in here.requires or ()]
    return found


def install(wheels: Path) -> None:
    """What is missing, from a folder; again, while that brings requirements of its own that are missing too."""
    tried: set[str] = set()
    while missing := {name for name, version in closure(requirements()).items() if version is None} - tried:
        for name in sorted(missing):
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
                            "--find-links", str(wheels), name], check=False)
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
    parser.add_argument("--only", nargs="+", choices=list(parts(Path(), None, 1)), help="default: all parts")
    parser.add_argument("--rows", type=Path, help='JSON lines of {"instruction", "input", "output"}; default: made up')
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=3000, help="of each part; default 3000")
    parser.add_argument("--to", type=Path, help="folder of results")
    asked = parser.parse_args()
    if asked.wheels:
        install(asked.wheels)
    needed = closure(requirements())
    if asked.needs:
        print(*(f"{name}=={version}" if version else name for name, version in sorted(needed.items())), sep="\n")
        return 0
    if missing := sorted(name for name, version in needed.items() if version is None):
        print(f"missing here, or of a version that does not fit: {' '.join(missing)}\n"
              f"  mend: pip install {' '.join(missing)}, or --wheels FOLDER", file=sys.stderr)
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
        if asked.only is None or name in asked.only:
            started = time.perf_counter()
            codes[name] = _run(words, asked.limit_s)
            print(f"{name}: exit {codes[name]} after {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if any(codes.values()) else 0


def _run(words: Sequence[str], limit_s: float) -> int:
    from benchmarks.launches import ended  # late: what it imports may be missing when this file is read

    try:
        return ended([sys.executable, *words], cwd=ROOT, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return 124


if __name__ == "__main__":
    sys.exit(main())
