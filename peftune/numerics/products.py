"""Products of bfloat16 matrices on CPUs that have no instructions for them.

There torch 2.13 multiplies in loops of its own, 8 to 100 times slower than in float32. The product of two bfloat16
numbers is exact in float32, so the sums can be taken there and rounded once: no less exact than a kernel for bfloat16,
near the speed of float32, while weights and activations stay half as large.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

FEW_ROWS = 4
"""Up to here torch's dot products, which read transposed weights once, are faster than widening those."""
TILE = 2**21
"""Numbers of the larger matrix that are widened at a time: 8 MiB of float32."""

Parts = Callable[[Tensor, Tensor], Iterator[tuple[Any, Tensor, Tensor]]]
"""Of two bfloat16 factors: where a part of their product belongs, and that part's factors in float32."""


def lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU on which oneDNN does not multiply bfloat16 (it asks for AVX-512 or AVX-VNNI-2)."""
    return (platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def multiply_in_float32() -> Library:
    """From now on this process multiplies bfloat16 matrices on the CPU in float32, and rounds the results.

    It takes the place of torch's kernels, so that every road comes here: models' own code, autograd, DeepSpeed,
    generation. Matrices of other types go on to torch's kernels, some 5 us later.

    Returns:
        What holds the kernels in place.
    """
    library = Library("aten", "IMPL")
    for plain, summed, parts in (("mm", "addmm", _tiles), ("bmm", "baddbmm", _batches)):
        product = _Product(get_kernel(f"aten::{plain}", "CPU"), parts)
        _answer(library, plain, product.of)
        _answer(library, f"{plain}.out", product.into)
        _answer(library, summed, product.added_to)
        _answer(library, f"{summed}_", product.added_in_place)
        _answer(library, f"{summed}.out", product.added_into)
    name = "_scaled_dot_product_flash_attention_for_cpu_backward"
    _answer(library, name, functools.partial(_attention_backward, get_kernel(f"aten::{name}", "CPU")))
    return library


def _answer(library: Library, name: str, widened: Callable[..., Any]) -> None:
    """Answer an operator's calls on bfloat16; torch's kernel answers the others, and those that `widened` leaves."""
    kernel = get_kernel(f"aten::{name}", "CPU")

    def answer(keys: Any, *args: Any, **kwargs: Any) -> Any:
        ours = all(x.dtype is torch.bfloat16 for x in args[:3] if isinstance(x, Tensor))  # what is multiplied and added
        taken = widened(keys, *args, **kwargs) if ours else NotImplemented
        return kernel.call_boxed(keys, *args, **kwargs) if taken is NotImplemented else taken

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is taken over
        library.impl(name, answer, "CPU", with_keyset=True)


class _Product:
    """A product of matrices and its variants, by the names and arguments of torch's operators."""

    def __init__(self, kernel: Any, parts: Parts) -> None:
        self.kernel, self.parts = kernel, parts  # the kernel itself, below dispatch: no autocast may round its factors

    def of(self, keys: Any, a: Tensor, b: Tensor) -> Any:
        if a.shape[-2] <= FEW_ROWS and b.stride(-2) == 1:
            return NotImplemented
        return self._fill(keys, a.new_empty(*a.shape[:-1], b.shape[-1]), a, b)

    def into(self, keys: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Any:
        return self.added_into(keys, out, a, b, beta=0, out=out)

    def added_to(self, keys: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        return self._fill(keys, a.new_empty(*a.shape[:-1], b.shape[-1]), a, b, added, beta, alpha)

    def added_in_place(self, keys: Any, out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        return self._fill(keys, out, a, b, out, beta, alpha)

    def added_into(
        self, keys: Any, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor,
    ) -> Any:
        fits = out.dtype is torch.bfloat16 and out.shape == (*a.shape[:-1], b.shape[-1])
        return self._fill(keys, out, a, b, added, beta, alpha) if fits else NotImplemented

    def _fill(
        self, keys: Any, out: Tensor, a: Tensor, b: Tensor, added: Tensor | None = None, beta: float = 1,
        alpha: float = 1,
    ) -> Tensor:
        """out = beta added + alpha (a b), each number rounded once."""
        term = None if added is None or beta == 0 else added.expand(out.shape)
        for where, left, right in self.parts(a, b):
            part = self.kernel.call_boxed(keys, left, right)
            if alpha != 1:
                part.mul_(alpha)
            out[where] = part if term is None else part.add_(term[where], alpha=beta)
        return out


def _tiles(a_MK: Tensor, b_KN: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """The larger factor a tile at a time, the smaller one whole."""
    step = max(1, TILE // max(a_MK.shape[1], 1))
    if a_MK.numel() > b_KN.numel():
        right = b_KN.float()
        for at in range(0, a_MK.shape[0], step):
            yield slice(at, at + step), a_MK[at:at + step].float(), right
    else:
        left = a_MK.float()
        for at in range(0, b_KN.shape[1], step):
            yield (slice(None), slice(at, at + step)), left, b_KN[:, at:at + step].float()


def _batches(a_BMK: Tensor, b_BKN: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """As many of the batch as a tile holds, at least one."""
    step = max(1, TILE // max(a_BMK[0].numel(), b_BKN[0].numel(), 1)) if a_BMK.shape[0] else 1
    for at in range(0, a_BMK.shape[0], step):
        yield slice(at, at + step), a_BMK[at:at + step].float(), b_BKN[at:at + step].float()


def _attention_backward(
    kernel: Any, keys: Any, slope: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:
    mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    slopes = kernel.call_boxed(keys, slope.float(), query.float(), key.float(), value.float(), out.float(), logsumexp,
                               dropout_p, is_causal, attn_mask=mask, scale=scale)
    return tuple(x.bfloat16() for x in slopes)
