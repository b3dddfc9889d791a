"""GGUF files by llama.cpp's own converter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peftune.errors import Fault, MachineError, ModelError

SCRIPT = "convert_hf_to_gguf.py"
PLACE = "LLAMA_CPP"
"""Environment variable: the folder of a llama.cpp checkout."""
OUTPUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
GET = ("git clone --depth 1 https://github.com/ggml-org/llama.cpp, pip install gguf sentencepiece, "
       f"then --llama-cpp FOLDER or {PLACE}=FOLDER")


@dataclass(frozen=True, slots=True)
class Converter:
    """llama.cpp's script."""

    script: Path


def find_converter(folder: str | None) -> Converter:
    """The converter of the checkout that is named here or by LLAMA_CPP.

    Raises:
        MachineError: none is named, it is not there, or the package that reads its files is missing.
    """
    named = folder or os.environ.get(PLACE)
    if not named:
        raise _missing("--gguf needs llama.cpp's converter, and no folder of llama.cpp is named")
    script = Path(named).resolve() / SCRIPT
    if not script.is_file():
        raise _missing(f"no {SCRIPT} in {named}")
    if importlib.util.find_spec("gguf") is None:
        raise _missing("--gguf needs the package gguf, which reads the file again to compare it")
    return Converter(script)


def convert(converter: Converter, folder: Path, dtype: str) -> Path:
    """Convert a folder with a whole model; return the file, which lies in the folder.

    Raises:
        ModelError: the converter refuses the model. Its last line is in the message.
    """
    target = folder / f"model-{OUTPUT_TYPES[dtype]}.gguf"
    done = subprocess.run(
        [sys.executable, str(converter.script), str(folder), "--outfile", str(target), "--outtype",
         OUTPUT_TYPES[dtype]], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not target.is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise ModelError(Fault(kind="model", file=str(converter.script), message="cannot convert this model: "
                               f"{said[-1][:300]}", mend="a newer llama.cpp may know it; or export without --gguf"))
    return target


def _missing(message: str) -> MachineError:
    return MachineError(Fault(kind="environment", message=message, mend=GET))
