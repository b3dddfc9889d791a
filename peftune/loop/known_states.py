"""What frozen layers give for each example of a split, in files without names: they are gone when the process is."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftune.data.examples import Batch
from peftune.data.store import Readable
from peftune.model.frozen_layers import FrozenLayers


class StateFile:
    """Hidden states of a split's examples."""

    def __init__(self, folder: Path, lengths: np.ndarray, sample_TD: Tensor) -> None:
        """`lengths`: tokens of each example. `sample_TD`: hidden states of some tokens. Raises OSError: no room."""
        self._width, self._dtype = sample_TD.shape[1], sample_TD.dtype
        self._sizes = lengths.astype(np.int64) * self._width * self._dtype.itemsize
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (as long as the run)
        if sys.platform == "linux":  # a full disk is found out now
            os.posix_fallocate(self._file.fileno(), 0, self.bytes)

    @property
    def bytes(self) -> int:
        """On disk."""
        return int(self._sizes.sum())

    def write(self, positions: Sequence[int], hidden_TD: Tensor) -> None:
        """Keep the states of some examples, which lie end to end. Raises OSError."""
        data, at = hidden_TD.contiguous().view(torch.uint8).cpu().numpy().reshape(-1), 0
        for position in positions:
            self._file.seek(self._starts[position])
            data[at : at + self._sizes[position]].tofile(self._file)
            at += self._sizes[position]

    def read(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """[T, D]: the states of some examples, end to end."""
        parts = []
        for position in positions:
            self._file.seek(self._starts[position])
            parts.append(np.fromfile(self._file, np.uint8, self._sizes[position]))
        hidden_TD = torch.from_numpy(np.concatenate(parts)).view(self._dtype).view(-1, self._width)
        return hidden_TD.to(device, non_blocking=True)


class KnownStates:
    """What is known of the frozen layers' results; nothing, until `keep` is called."""

    def __init__(self) -> None:
        self._layers: FrozenLayers | None = None
        self._files: list[tuple[Readable, StateFile]] = []

    def keep(self, layers: FrozenLayers, files: Sequence[tuple[Readable, StateFile]]) -> None:
        """From here on, batches of these splits start behind the layers."""
        self._layers, self._files = layers, list(files)

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.bytes for _, file in self._files)

    def of(self, split: Readable, batch: Batch) -> AbstractContextManager[None]:
        """Around a forward pass of a batch of the split."""
        file = next((file for known, file in self._files if known is split), None)
        if self._layers is None or file is None or not batch.positions:
            return contextlib.nullcontext()
        return self._layers.given(file.read(batch.positions, batch.targets.device), batch.lengths)
