"""Models, heads, adapters, precision, saving. The only room that imports peft and bitsandbytes."""

import importlib.util
import logging
import os

NO_COMPILER = "TORCHDYNAMO_DISABLE"


def _import_bitsandbytes() -> None:
    """Import bitsandbytes, as peft will, without torch's compiler.

    At its import it has `torch.compile` wrap what stands in for its own kernels, which would then be compiled at their
    first calls. It has kernels for CPUs and CUDA; where they do not take a shape, the same code runs uncompiled.
    """
    # it also recommends a package for faster 4-bit products on CPUs, to runs without any too
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    try:
        importlib.import_module("bitsandbytes")
    finally:
        os.environ.pop(NO_COMPILER)
        if before is not None:
            os.environ[NO_COMPILER] = before


if importlib.util.find_spec("bitsandbytes"):
    _import_bitsandbytes()
