"""Few shapes of products on CPUs. oneDNN makes code for each shape of a product in bfloat16 when it first meets it."""

from __future__ import annotations

import functools
import os

import torch

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT_PRODUCTS = 128
"""A run keeps the code of so many shapes of products. oneDNN and torch's ideep would each keep 1,024, of half a
megabyte; packed micro-batches seldom have a shape twice, and making one takes less than a millisecond."""
KEPT_SLOW_PRODUCTS = 256
"""Where making one takes longer (`makes_code_slowly`), and micro-batches have few sizes therefore."""
SIZES = 16
"""Numbers of tokens of rows that are filled up, from any to its double."""


@functools.cache
def makes_code_slowly(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies the type in tiles (AMX): there oneDNN takes several milliseconds to make the code for
    another number of rows, in which it could multiply thousands of them."""
    return dtype == torch.bfloat16 and bool(torch.cpu.get_capabilities().get("amx_tile"))


def takes_few_sizes(dtype: torch.dtype, *, on_cpu: bool, divided: bool) -> bool:
    """Whether packed rows are filled up to few sizes: where a CPU computes each of them whole and makes code slowly."""
    return on_cpu and not divided and makes_code_slowly(dtype)


def filled_up(tokens: int) -> int:
    """The next number of tokens of few: `SIZES` from any to its double, all of them multiples of a tile's 32."""
    step = max(32, 2 ** (tokens - 1).bit_length() // (2 * SIZES))
    return tokens + -tokens % step


def keep_few_products() -> None:
    """Bound the caches of code for products. They read it once, before a process's first product in bfloat16."""
    kept = KEPT_SLOW_PRODUCTS if makes_code_slowly(torch.bfloat16) else KEPT_PRODUCTS
    for name in CAPACITIES:
        os.environ.setdefault(name, str(kept))
