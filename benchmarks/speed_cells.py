"""The ways to train whose speed is measured, in suites.

quick: LoRA and all weights of 60 million. shapes: LoRA on 60, 150 and 500 million weights. scaling: processes, ranks of
the adapter, lengths. overhead: the loop beside the same kernels without it (BENCH_BARE of timed_train.py), with 60
million weights and with one, whose steps are short. allocator: host memory handed out by glibc, and by tcmalloc.
frozen: LoRA of the last layers alone, over epochs for which the others are computed once, or each time. sizes: for a
CPU with AMX, packed rows of few sizes and of any, with 60 million weights and with one. products: for a
CPU without instructions for bfloat16, beside float32 and, on few tokens, beside torch's own products. gpu: models of
the sizes of Qwen2.5 0.5B, 1.5B and Llama 3.1 8B; LoRA on bfloat16 and on nf4, all weights; rows that fill 4,096 tokens,
and instructions as long as they are; the smallest with compiled parts, and with attention of one sequence after another
too. gpu-tiny has the same kinds of cells, small enough for a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to train. LoRA is of all linear layers."""

    shape: str = "60m"
    rank: int | None = 16
    """Of LoRA; None trains all weights."""
    max_length: int = 512
    processes: int = 1
    rows: int = 128
    batch_size: int = 16
    micro_batch_tokens: int = 2048
    bare: bool = False
    quantization: str = "none"
    recompute: bool = False
    full_rows: bool = False
    """Every row fills `max_length`, nearly all of it supervised."""
    tcmalloc: bool = False
    """Preloaded, as `peftune train` does where it is installed; else memory is glibc's."""
    last_layers: int = 0
    """LoRA of so many alone; 0 is all of them."""
    reuse: bool = True
    """What frozen layers give is computed once."""
    epochs: int = 1
    dtype: str = "bfloat16"
    native: bool = False
    """With torch's own products of bfloat16 even where they are slow (BENCH_NATIVE of timed_train.py)."""
    any_size: bool = False
    """Packed rows are as long as their examples, also where code for new sizes is made slowly (BENCH_ANY_SIZE)."""
    one_by_one: bool = False
    """Attention of one packed sequence after another, also where a kernel takes all at once (BENCH_ONE_BY_ONE)."""
    parts: bool = False
    """With model.compile=parts."""

    @property
    def switches(self) -> Mapping[str, str]:
        """Environment variables of timed_train.py."""
        return {name: "1" for name, on in {"BENCH_BARE": self.bare, "BENCH_NATIVE": self.native,
                                           "BENCH_ANY_SIZE": self.any_size, "BENCH_ONE_BY_ONE": self.one_by_one}.items()
                if on}

    def __str__(self) -> str:
        method = f"LoRA r {self.rank}" if self.rank else "all weights"
        words = [self.shape, method + (f" on {self.quantization}" if self.quantization != "none" else ""),
                 f"{'rows of' if self.full_rows else 'up to'} {self.max_length} tokens",
                 *([f"{self.micro_batch_tokens} a micro-batch"] if self.micro_batch_tokens != 2048 else []),
                 *(["recomputed"] if self.recompute else []),
                 *([f"{self.processes} processes"] if self.processes > 1 else []), *(["bare"] if self.bare else []),
                 *(["tcmalloc"] if self.tcmalloc else []),
                 *([f"last {self.last_layers} layers"] if self.last_layers else []),
                 *([f"{self.epochs} epochs"] if self.epochs > 1 else []), *([] if self.reuse else ["computed anew"]),
                 *([self.dtype] if self.dtype != "bfloat16" else []), *(["native products"] if self.native else []),
                 *(["rows of any size"] if self.any_size else []), *(["one by one"] if self.one_by_one else []),
                 *(["compiled parts"] if self.parts else [])]
        return ", ".join(words)


def _on_gpu(small: str, middle: str, large: str, tokens: int, rows: int) -> Sequence[Cell]:
    """The kinds of cells that one GPU of 80 GB is measured with: ragged rows, then rows that fill their length."""
    ragged = {"max_length": tokens // 4, "rows": 16 * rows, "batch_size": 32, "micro_batch_tokens": 2 * tokens}
    full = {"max_length": tokens, "rows": rows, "batch_size": 4, "micro_batch_tokens": tokens, "full_rows": True}
    first = Cell(shape=small, **ragged)
    return (first, replace(first, one_by_one=True), replace(first, parts=True),
            Cell(shape=small, rank=None, **ragged), Cell(shape=middle, **ragged),
            Cell(shape=middle, quantization="nf4", **ragged), Cell(shape=middle, rank=None, **full),
            Cell(shape=large, **full), Cell(shape=large, quantization="nf4", **full), Cell(shape=large, **ragged),
            Cell(shape=large, recompute=True, **{**full, "micro_batch_tokens": 2 * tokens}))


_LAST = Cell(last_layers=3, epochs=5, rows=96)
_SMALL = Cell(shape="1m", rows=640)
_FEW = Cell(rows=8, batch_size=2, max_length=64)
SUITES: Mapping[str, Sequence[Cell]] = {
    "quick": (Cell(), Cell(rank=None)),
    "shapes": (Cell(), Cell(shape="150m", rows=80), Cell(shape="500m", rows=64)),
    "scaling": (Cell(), Cell(processes=2), Cell(rank=64), Cell(max_length=128), Cell(max_length=1024)),
    "overhead": (Cell(), Cell(bare=True), Cell(shape="1m", rows=640), Cell(shape="1m", rows=640, bare=True)),
    "allocator": (Cell(), Cell(tcmalloc=True)),
    "frozen": (_LAST, replace(_LAST, reuse=False)),
    "sizes": (Cell(), Cell(any_size=True), _SMALL, replace(_SMALL, any_size=True)),
    "products": (Cell(), Cell(dtype="float32"), _FEW, replace(_FEW, dtype="float32"), replace(_FEW, native=True)),
    "gpu": _on_gpu("qwen-0.5b", "qwen-1.5b", "llama-8b", 4096, 32),
    "gpu-tiny": _on_gpu("qwen-1m", "qwen-1m", "1m", 512, 16),
    "tiny": (Cell(shape="1m", rows=16, batch_size=4, micro_batch_tokens=512, max_length=64),),
}
