"""The Settings of one memserve: nested, frozen, checked once in the builder; an unknown key is refused by its name.

`args:` of serve_config.yaml win; an environment variable fills what they leave out (`MEMSERVE_MODEL__NAME`, two
underscores for one level); the defaults below fill the rest. Some can be changed while it runs, by `user_config:` of a
deployment (LIVE). Pure code never sees this module: it takes plain arguments.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "MEMSERVE_"

# What `user_config:` may set, by deployment.
LIVE = {
    "Embedder": {
        "log_level",
        "queue.max_batch_size",
        "queue.batch_wait_s",
        "queue.max_batch_tokens",
        "queue.forwards_in_flight",
        "queue.max_queued_tokens",
    },
    "Gateway": {
        "log_level",
        "cache.max_bytes",
        "gateway.max_body_bytes",
        "gateway.embed_calls_in_flight",
        "gateway.embed_call_tokens",
        "gateway.append_calls_in_flight",
        "gateway.append_call_memories",
        "gateway.max_queued_tokens",
    },
    "Store": {"log_level", "store.index_budget_bytes"},
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(_Section):
    """Which model embeds, and where."""

    provider: Literal["local", "openai", "fake"] = Field(
        "local", description="`local` (sentence-transformers), `openai` (any OpenAI-compatible URL), `fake` (for tests)"
    )
    name: str = Field(
        "all-MiniLM-L6-v2",
        min_length=1,
        description="the embedded model, a sentence-transformers directory, a hub name, or the remote model's name",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="`auto`: bfloat16 where the device multiplies it in hardware, else float32"
    )
    max_tokens: int | None = Field(None, ge=4, description="longest input in tokens; default: the model's own")
    base_url: str | None = Field(None, description="`openai`: the server's URL, ending in /v1")
    api_key_env: str = Field("OPENAI_API_KEY", description="`openai`: environment variable that holds the key")
    dim: int | None = Field(None, ge=1, le=16_384, description="`openai`, `fake`: dimension of the vectors")
    allow_download: bool = Field(True, description="`local`: fetch a hub model that is not on disk")
    timeout_s: float = Field(60.0, gt=0.0, description="`openai`: seconds that one call may take")
    max_retries: int = Field(3, ge=0, description="`openai`: attempts after the first")

    @model_validator(mode="after")
    def _remote_needs_a_url(self) -> "ModelSettings":
        if self.provider == "openai" and not self.base_url:
            raise ValueError("provider `openai` needs model.base_url")
        return self


class QueueSettings(_Section):
    """How texts become device batches."""

    enabled: bool = Field(True, description="false: each request is a forward of its own (a baseline to compare with)")
    max_batch_size: int = Field(64, ge=1, description="calls that the @serve.batch intake takes at once")
    batch_wait_s: float = Field(0.0, ge=0.0, le=10.0, description="seconds that the intake waits for more calls")
    max_batch_tokens: int | None = Field(
        None, ge=8, description="padded tokens of one forward; default: what the sweep found for the device"
    )
    forwards_in_flight: int | None = Field(None, ge=1, le=16, description="default: 1 on CPU, 2 on CUDA")
    max_queued_tokens: int = Field(65_536, ge=1, description="tokens that may wait in one replica; past it 429")


class CacheSettings(_Section):
    """Vectors of texts seen before, in front of the queue."""

    max_bytes: int = Field(64 * 1024 * 1024, ge=0, description="bytes of vectors a gateway keeps; 0 switches it off")


class Replicas(_Section):
    """How many replicas of a deployment, and what each is given. What is None, serving/sizing.py fills in."""

    min_replicas: int = Field(1, ge=0, description="replicas that are always there")
    max_replicas: int | None = Field(
        None, ge=1, description="replicas that autoscaling may start; default: what the CPUs and GPUs have room for"
    )
    upscale_delay_s: float = Field(3.0, ge=0.0, description="seconds of excess load before a replica is added")
    downscale_delay_s: float = Field(60.0, ge=0.0, description="seconds of slack before one is taken away")

    @model_validator(mode="after")
    def _min_is_at_most_max(self) -> "Replicas":
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class EmbedderSettings(Replicas):
    """The deployment that runs the model."""

    min_replicas: int = Field(1, ge=0, description="replicas that are always there; 0: the first request waits for one")
    target_drain_s: float = Field(1.0, gt=0.0, description="seconds in which the tokens that wait should be done")
    target_busy: float = Field(0.8, gt=0.0, le=1.0, description="share of the time in which one should be at work")
    num_cpus: float | None = Field(
        None,
        gt=0.0,
        description="CPUs that Ray reserves for one; intra-op threads follow it, at least one; default: up to 1",
    )
    num_gpus: float | None = Field(
        None, ge=0.0, description="share of a GPU that Ray reserves for one; default: 0.33 where there are GPUs"
    )
    num_threads: int | None = Field(None, ge=1, description="intra-op threads of one replica; default: from num_cpus")


class StoreSettings(Replicas):
    """The deployment that keeps the memories, and the log behind it."""

    min_replicas: int = Field(1, ge=1, description="replicas that are always there")
    target_busy: float = Field(0.8, gt=0.0, le=1.0, description="share of the time in which one should be at work")
    num_cpus: float = Field(0.1, gt=0.0, description="CPUs that Ray reserves for one replica; not a limit")
    url: str = Field(
        "sqlite:///data/memserve.db",
        description="`sqlite:///path`, `postgresql+psycopg://...`, or `memory://` (thrown away at the end)",
    )
    synchronous: Literal["FULL", "NORMAL"] = Field(
        "FULL", description="SQLite: FULL survives a power cut, NORMAL only the process"
    )
    index_budget_bytes: int = Field(1024**3, ge=1024**2, description="bytes of indexes that one replica keeps resident")
    exact_below: int = Field(2_000, ge=0, description="memories up to which a user's index is an exact matrix")
    m: int = Field(16, ge=2, le=128, description="HNSW: links of a node")
    ef_construction: int = Field(200, ge=8, description="HNSW: breadth of the search while building")
    ef: int = Field(128, ge=8, description="HNSW: breadth of a search")
    snapshot_dir: str | None = Field(None, description="local directory for snapshots of large indexes; default: none")
    partitions: int = Field(16, ge=1, le=4096, description="buckets of users that routing keeps on one warm replica")


class GatewaySettings(Replicas):
    """The HTTP ingress and the handle."""

    min_replicas: int = Field(1, ge=1, description="replicas that are always there")
    target_ongoing_requests: float = Field(64.0, gt=0.0, description="requests in progress that one replica serves")
    num_cpus: float = Field(0.1, gt=0.0, description="CPUs that Ray reserves for one replica; not a limit")
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024, description="largest request body; past it 413")
    embed_calls_in_flight: int | None = Field(
        None, ge=1, description="calls to the embedder at once; default: for each replica it may have 1, on a GPU 2"
    )
    embed_call_tokens: int = Field(2_048, ge=1, description="estimated tokens in one call to the embedder")
    append_calls_in_flight: int = Field(2, ge=1, description="write calls to the store at once")
    append_call_memories: int = Field(1024, ge=1, description="memories in one write call to the store")
    max_queued_tokens: int = Field(65_536, ge=1, description="tokens (estimated) that may wait here; past it 429")


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        protected_namespaces=(),
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = Field(
        None, description="of the deployments' logs; default: that of `logging_config`"
    )
    model: ModelSettings = ModelSettings()
    queue: QueueSettings = QueueSettings()
    cache: CacheSettings = CacheSettings()
    embedder: EmbedderSettings = EmbedderSettings()
    store: StoreSettings = StoreSettings()
    gateway: GatewaySettings = GatewaySettings()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, values: Any) -> Any:
        """pydantic-settings ignores an unknown top-level variable; a typo there must not pass in silence."""
        for variable in os.environ:
            if variable.startswith(ENV_PREFIX):
                section = variable.removeprefix(ENV_PREFIX).split("__")[0].lower()
                if section not in cls.model_fields:
                    raise ValueError(f"environment variable {variable}: unknown setting `{section}`")
        return values


def explain(error: ValidationError) -> str:
    """One line that names the first wrong setting by its path (`model.nmae: unknown setting`)."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown setting"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def load(args: Mapping[str, Any]) -> Settings:
    """Settings from `args:`, the environment and the defaults. Raises pydantic's ValidationError."""
    return Settings.model_validate({str(name): value for name, value in args.items()})


def live(settings: Settings, deployment: str, user_config: Mapping[str, Any] | None) -> Settings:
    """Settings with what a deployment's `user_config:` changes, written as in `args:`.

    Raises:
        ValueError: one line that names the first wrong one by its path.
    """
    if not isinstance(user_config, Mapping | None):
        raise ValueError(f"user_config of {deployment}: must be a mapping")
    values = settings.model_dump()
    allowed = LIVE[deployment]
    for path, value in _paths(user_config or {}):
        if path not in allowed:
            raise ValueError(f"user_config of {deployment}: {path}: not a setting that it can change while it runs")
        *sections, name = path.split(".")
        section = values
        for step in sections:
            section = section[step]
        section[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"user_config of {deployment}: {explain(error)}") from error


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def absolute_log_url(url: str, base: Path) -> str:
    """A relative SQLite path made absolute against `base`, so that every replica opens the same file."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url.startswith("sqlite:////"):
        return url
    return f"{prefix}{base / url.removeprefix(prefix)}"
