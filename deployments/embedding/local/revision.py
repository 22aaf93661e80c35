"""Identifies the exact content of a model, so that a cached vector is never used for another model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

# The files of a model's folder that determine its vectors: configuration, vocabulary, weights.
_SUFFIXES = {".json", ".txt", ".model", ".safetensors", ".bin"}


def revision_of(path: str, network: Any) -> str:
    """Name the content of a model in sixteen characters: a hash of the folder's files, or the commit of a hub model.

    Args:
        path: the folder or hub name that the model was loaded from.
        network: the loaded SentenceTransformer. For a hub model its configuration holds the commit.
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
