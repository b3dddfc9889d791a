"""Models, heads, adapters, precision, saving. The only room that imports peft and bitsandbytes."""

import logging

# at its import bitsandbytes recommends a package for faster 4-bit products on CPUs, to runs without any too
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
