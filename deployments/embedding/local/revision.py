"""A name for a model's exact content, so that a cached vector is never taken for another model's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

# What of a model's folder makes its vectors: configuration, vocabulary, weights.
_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin"}


def revision_of(path: str, network: Any) -> str:
    """Sixteen hexadecimal digits of a hash of the files in a folder, or the commit of a hub model.

    Args:
        path: as `LocalModel` was given it.
        network: the loaded SentenceTransformer, which knows a hub model's commit.
    """
    folder = Path(path)
    if not folder.is_dir():
        return str(getattr(network[0].model.config, "_commit_hash", None) or path)[:16]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*")):
        if file.suffix in _SUFFIXES and file.is_file():
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
