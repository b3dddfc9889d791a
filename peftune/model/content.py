"""What tells the files of a model from others of the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from peftune.model.folder import CONFIG

READ = ("*.safetensors", "pytorch_model*.bin", CONFIG, "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
        "sentencepiece.bpe.model", "*.py")
"""Files that a model and its tokenizer are made of."""
BLOCK_BYTES, MOST_BLOCKS = 2**18, 64
"""A file of more than these (16 MiB) is looked at in so many places, spread evenly: training changes weights all over
it, and each start of a run pays for the look."""


def fingerprints(source: str, revision: str | None, others: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 by file name of what a model is read from; of a hub's repository, what of it is cached.

    Args:
        source: folder or hub id.
        revision: of the hub's repository.
        others: folders of adapters that it is read with.
    """
    folders = [(_folder_of(source, revision), ""), *((Path(other), f"{other}/") for other in others)]
    files = {f"{prefix}{file.name}": file for folder, prefix in folders if folder is not None
             for pattern in READ for file in sorted(folder.glob(pattern)) if file.is_file()}
    with ThreadPoolExecutor() as pool:  # hashing and reading let other threads run
        return dict(zip(files, pool.map(_fingerprint, files.values()), strict=True))


def _folder_of(source: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    cached = try_to_load_from_cache(source, CONFIG, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    blocks = -(-size // BLOCK_BYTES)
    taken = min(blocks, MOST_BLOCKS)
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(taken):
            stream.seek(number * (blocks - 1) // max(1, taken - 1) * BLOCK_BYTES)
            found.update(stream.read(BLOCK_BYTES))
    return found.hexdigest()
