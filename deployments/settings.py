"""The settings of a memserve: nested, frozen, and checked once, when the application is built.

A setting takes its value from `args:` in serve_config.yaml; from an environment variable (`MEMSERVE_MODEL__NAME`, two
underscores for each level) if `args:` leaves it out; and from the defaults below if both do. An unknown setting is
refused by its name. `user_config:` of a deployment may change some settings while the server runs (RELOADABLE).
Only deployments and the code that starts them read settings; everything else takes plain arguments.

docs/settings.md is generated from the descriptions below.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "MEMSERVE_"
CLIENT_VARIABLES = frozenset({"MEMSERVE_URL", "MEMSERVE_API_KEY"})
"""Variables of the client (memserve/client.py), which are no settings."""

EVERYDAY = (
    "model.name",
    "model.provider",
    "model.device",
    "model.dtype",
    "model.max_tokens",
    "model.base_url",
    "model.api_key_env",
    "model.allow_download",
    "store.url",
    "store.index_budget_bytes",
    "store.snapshot_dir",
    "embedder.min_replicas",
    "embedder.max_replicas",
    "embedder.num_gpus",
    "store.max_replicas",
    "gateway.max_body_bytes",
    "auth.mode",
    "cache.max_bytes",
    "queue.max_queued_tokens",
    "log_level",
)
"""The settings that most users need, in the order in which the documentation lists them."""

_RELOADABLE_BY_EMBEDDER = {
    "log_level",
    "queue.max_batch_size",
    "queue.batch_wait_s",
    "queue.max_batch_tokens",
    "queue.forwards_in_flight",
    "queue.max_queued_tokens",
    "queue.max_wait_s",
}
RELOADABLE = {
    "Embedder": _RELOADABLE_BY_EMBEDDER,
    "Reranker": _RELOADABLE_BY_EMBEDDER,
    "Gateway": {
        "log_level",
        "cache.max_bytes",
        "gateway.max_body_bytes",
        "gateway.max_import_line_bytes",
        "gateway.embed_calls_in_flight",
        "gateway.embed_call_tokens",
        "gateway.append_calls_in_flight",
        "gateway.append_call_memories",
        "gateway.max_queued_tokens",
        "limits.requests_per_minute",
        "limits.tokens_per_minute",
        "queue.max_wait_s",
    },
    "Store": {"log_level", "queue.max_wait_s", "store.index_budget_bytes"},
}
"""Deployment -> the settings that its `user_config:` may change while the server runs."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(_Section):
    """The embedding model, and where it runs."""

    provider: Literal["local", "openai", "fake"] = Field(
        "local",
        description="Where vectors come from. `local` runs the model here, with PyTorch; `openai` calls any server "
        "with an OpenAI-compatible API; `fake` makes deterministic vectors for tests.",
    )
    name: str = Field(
        "all-MiniLM-L6-v2",
        min_length=1,
        description="The model. `local` takes the name of a model that is installed with memserve, the path of a "
        "sentence-transformers folder, or a name on the Hugging Face hub; `openai` takes the remote server's name.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="The device of a `local` model: `cpu`, `cuda` or `cuda:N`. `auto` uses a GPU if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="The number format of a `local` model's weights and arithmetic. `auto` chooses bfloat16 if the "
        "device multiplies it in hardware, and float32 otherwise.",
    )
    max_tokens: int | None = Field(
        None,
        ge=4,
        description="The longest input, in tokens; what exceeds it is cut off or refused, as the request's `truncate` "
        "says. By default the model's own limit; 8,192 for `openai`, 256 for `fake`.",
    )
    base_url: str | None = Field(
        None, description="`openai` only, and required there: the URL of the remote server, ending in `/v1`."
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="`openai` only: the environment variable that holds the API key."
    )
    dim: int | None = Field(
        None,
        ge=1,
        le=16_384,
        description="`openai` and `fake` only: the dimension of the vectors. By default `openai` asks the remote "
        "server, and `fake` makes 32.",
    )
    allow_download: bool = Field(
        True, description="`local` only: whether a model from the hub that is not on disk may be downloaded."
    )
    token_ids: Literal["checked", "any", "refuse"] = Field(
        "checked",
        description="Which token ids are accepted in place of texts. `checked` refuses ids that do not begin and end "
        "with the special tokens that the model's tokenizer puts around a text, since ids of another tokenizer give a "
        "wrong vector. If the tokenizer puts none, and with `openai`, whose server has the tokenizer, it accepts all. "
        "`any` accepts all ids, and `refuse` none.",
    )
    timeout_s: float = Field(60.0, gt=0.0, description="`openai` only: the longest time for one call, in seconds.")
    max_retries: int = Field(3, ge=0, description="`openai` only: how often a failed call is repeated.")

    @model_validator(mode="after")
    def _remote_needs_a_url(self) -> "ModelSettings":
        if self.provider == "openai" and not self.base_url:
            raise ValueError("provider `openai` needs model.base_url")
        return self


class QueueSettings(_Section):
    """How an embedder makes batches of the texts that wait."""

    enabled: bool = Field(
        True,
        description="Whether requests are batched. `false` runs the model once for each request; it is a baseline to "
        "compare with.",
    )
    max_batch_size: int = Field(
        64, ge=1, description="The most calls that an embedder's `@serve.batch` intake takes at once."
    )
    batch_wait_s: float = Field(
        0.0,
        ge=0.0,
        le=10.0,
        description="How long the intake waits for more calls, in seconds. With 0 a call that arrives at an idle "
        "embedder is served at once; under load batches fill without waiting.",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=8,
        description="The most tokens in one run of the model, padding included. By default the value that was measured "
        "to be fastest on the device.",
    )
    forwards_in_flight: int | None = Field(
        None, ge=1, le=16, description="Runs of the model in progress at once. By default 1 on a CPU and 2 on a GPU."
    )
    max_queued_tokens: int = Field(
        65_536,
        ge=1,
        description="The tokens that may wait in one embedder: of queries, single texts and small requests, and as "
        "many of bulk requests. Beyond it a caller that has its share of them waiting is answered with status 429, and "
        "beyond twice as many everybody is.",
    )
    max_wait_s: float = Field(
        30.0,
        gt=0.0,
        description="The longest time, in seconds, that a request, or a piece of a large one, may wait in one queue of "
        "a gateway, an embedder or a store. It is then answered with status 504, and nothing of it is done.",
    )


class CacheSettings(_Section):
    """Vectors of recent texts, kept in each gateway."""

    max_bytes: int = Field(
        64 * 1024 * 1024,
        ge=0,
        description="The size of a gateway's cache of vectors, in bytes. 0 switches the cache off.",
    )


class Replicas(_Section):
    """How many replicas a deployment has, and what each is given. deployments/serving/sizing.py fills in each None."""

    min_replicas: int = Field(1, ge=0, description="The number of replicas that always run.")
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="The most replicas that autoscaling may start. By default as many as the CPUs and GPUs of the "
        "cluster have room for.",
    )
    upscale_delay_s: float = Field(
        3.0, ge=0.0, description="How long the load must need more replicas before one is added, in seconds."
    )
    downscale_delay_s: float = Field(
        60.0, ge=0.0, description="How long the load must need fewer replicas before one is removed, in seconds."
    )

    @model_validator(mode="after")
    def _min_is_at_most_max(self) -> "Replicas":
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class EmbedderSettings(Replicas):
    """The deployment that runs the model."""

    min_replicas: int = Field(
        1,
        ge=0,
        description="The number of embedders that always run. With 0 none runs while there are no requests, and the "
        "first request waits until one has started.",
    )
    target_drain_s: float = Field(
        1.0,
        gt=0.0,
        description="The time in which the waiting tokens should be embedded, in seconds. A larger backlog starts more "
        "embedders.",
    )
    target_busy: float = Field(
        0.8,
        gt=0.0,
        le=1.0,
        description="The share of the time, from 0 to 1, in which an embedder should be busy. A larger share starts "
        "more embedders.",
    )
    num_cpus: float | None = Field(
        None,
        gt=0.0,
        description="The CPUs that Ray reserves for one embedder. It computes with as many threads, rounded, and at "
        "least one. By default a share that lets all replicas fit, up to 1.",
    )
    num_gpus: float | None = Field(
        None,
        ge=0.0,
        description="The share of a GPU that Ray reserves for one embedder. By default 0.33 if there are GPUs, so that "
        "one embedder computes while another sends its answers.",
    )
    accelerator_type: str | None = Field(
        None,
        min_length=1,
        description="The kind of GPU that a replica needs, as Ray names it (`H100`, `L4`, `A10G`), for a cluster with "
        "several kinds. By default any.",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="The threads that one embedder computes with on a CPU. By default taken from `num_cpus`.",
    )


class RerankerSettings(EmbedderSettings):
    """The deployment that reranks texts with a cross-encoder. It exists only if `reranker.model` is set."""

    model: str | None = Field(
        None,
        min_length=1,
        description="The cross-encoder: the path of a folder that CrossEncoder of sentence-transformers can load, or a "
        "name on the Hugging Face hub, such as `cross-encoder/ms-marco-MiniLM-L6-v2`. By default there is none, and "
        "requests to rerank are refused.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="The device of the cross-encoder: `cpu`, `cuda` or `cuda:N`. `auto` uses a GPU if there is one.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="The number format of its weights and arithmetic. `auto` chooses bfloat16 if the device multiplies "
        "it in hardware, and float32 otherwise. The last layer is computed in float32 always.",
    )
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="The longest pair of a query and a text, in tokens. A longer one is cut, the longer part of it "
        "first. By default the model's own limit.",
    )
    allow_download: bool = Field(
        True, description="Whether a model from the hub that is not on disk may be downloaded."
    )
    min_replicas: int = Field(
        0,
        ge=0,
        description="The number of rerankers that always run. With 0 none runs while there are no requests to rerank, "
        "and the first such request waits until one has started.",
    )
    max_replicas: int | None = Field(
        None,
        ge=1,
        description="The most rerankers that autoscaling may start. By default one for every four CPUs, and at least "
        "one; on GPUs one for each.",
    )
    target_drain_s: float = Field(
        1.0,
        gt=0.0,
        description="The time in which the waiting tokens should be scored, in seconds. A larger backlog starts more "
        "rerankers.",
    )
    target_busy: float = Field(
        0.8,
        gt=0.0,
        le=1.0,
        description="The share of the time, from 0 to 1, in which a reranker should be busy. A larger share starts "
        "more rerankers.",
    )
    num_cpus: float | None = Field(
        None,
        gt=0.0,
        description="The CPUs that Ray reserves for one reranker. It computes with as many threads, rounded, and at "
        "least one. By default the share of an embedder.",
    )
    num_gpus: float | None = Field(
        None,
        ge=0.0,
        description="The share of a GPU that Ray reserves for one reranker. By default 0.33 if there are GPUs.",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="The threads that one reranker computes with on a CPU. By default taken from `num_cpus`.",
    )

    def of_model(self) -> dict[str, Any]:
        """The settings of the cross-encoder itself, by their names."""
        return self.model_dump(include={"model", "device", "dtype", "max_tokens", "allow_download"})


class StoreSettings(Replicas):
    """The deployment that keeps the memories, and the log on disk behind it."""

    min_replicas: int = Field(1, ge=1, description="The number of store replicas that always run.")
    target_busy: float = Field(
        0.8,
        gt=0.0,
        le=1.0,
        description="The share of the time, from 0 to 1, in which a store replica should be busy. A larger share "
        "starts more replicas.",
    )
    num_cpus: float = Field(
        0.1, gt=0.0, description="The CPUs that Ray reserves for one store replica. It may use more."
    )
    url: str = Field(
        "sqlite:///data/memserve.db",
        description="The database that holds the memories: `sqlite:///PATH` for one machine, "
        "`postgresql+psycopg://USER:PASSWORD@HOST/NAME` for a cluster, or `memory://`, which is lost at the end. A "
        "relative path starts at the folder in which the server is started.",
    )
    synchronous: Literal["FULL", "NORMAL"] = Field(
        "FULL",
        description="SQLite only. With `FULL` an acknowledged write survives a power cut; with `NORMAL` it survives "
        "the end of the process, and is faster.",
    )
    index_budget_bytes: int = Field(
        1024**3,
        ge=1024**2,
        description="The memory for users' indexes in one store replica, in bytes. Beyond it the indexes that were not "
        "used for longest are dropped, and read again when they are needed.",
    )
    exact_below: int = Field(
        5_000,
        ge=0,
        description="Up to this many memories a user is searched exactly; beyond it, with an HNSW graph.",
    )
    m: int = Field(16, ge=2, le=128, description="HNSW: the links of each node.")
    ef_construction: int = Field(200, ge=8, description="HNSW: how many candidates are kept while a graph is built.")
    ef: int = Field(
        128, ge=8, description="HNSW: how many candidates are kept in a search. More find more, and take longer."
    )
    bm25_k1: float = Field(
        0.7,
        ge=0.0,
        le=10.0,
        description="Searches by words: how much repetitions of a word in one memory count. With 0 they do not.",
    )
    bm25_b: float = Field(
        0.2,
        ge=0.0,
        le=1.0,
        description="Searches by words: how much less a word counts in a long memory. With 0 the length does not "
        "matter.",
    )
    snapshot_dir: str | None = Field(
        None,
        description="A local folder for snapshots of large indexes, which make a restart faster. By default no "
        "snapshots are written.",
    )
    partitions: int = Field(
        16,
        ge=1,
        le=4096,
        description="The number of groups into which users are divided. Requests of one group go to the same store "
        "replica, which keeps the indexes of its users in memory.",
    )


class GatewaySettings(Replicas):
    """The deployment that answers HTTP requests and handle calls."""

    min_replicas: int = Field(1, ge=1, description="The number of gateways that always run.")
    target_ongoing_requests: float = Field(
        64.0,
        gt=0.0,
        description="The number of requests in progress that one gateway should have. More start another gateway.",
    )
    num_cpus: float = Field(0.1, gt=0.0, description="The CPUs that Ray reserves for one gateway. It may use more.")
    max_body_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        description="The largest body of a request, in bytes. A larger one is answered with status 413.",
    )
    max_body_bytes_in_flight: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="The bytes of all bodies of more than 64 KiB that one gateway is reading or working on. The bodies "
        "of one key may have half of what those of other keys leave; without keys, each request counts as a key. A "
        "body beyond that is answered with status 429, unless it is the only one. Parsed bodies take a few times as "
        "much memory. Imports do not count, as they are read line by line.",
    )
    max_import_line_bytes: int | None = Field(
        None,
        ge=1024,
        description="The longest line of an import, in bytes. A line holds all states of a memory, so the default is "
        "16 times `gateway.max_body_bytes`. A longer one is answered with status 413; `memserve log import` "
        "has no limit.",
    )
    embed_calls_in_flight: int | None = Field(
        None,
        ge=1,
        description="The calls to embedders that one gateway makes at once, of bulk requests and of others each; twice "
        "as many if enough waits, and more small ones beside bulk calls. By default one for each embedder that "
        "may run, and two for each on a GPU.",
    )
    embed_call_tokens: int = Field(
        2_048, ge=1, description="The most tokens, as estimated, that one call to an embedder carries."
    )
    append_calls_in_flight: int = Field(
        2,
        ge=1,
        description="The calls to the store that one gateway makes at once to write, of large adds and of others each; "
        "more small ones beside large ones.",
    )
    append_call_memories: int = Field(1024, ge=1, description="The most memories that one such call carries.")
    max_queued_tokens: int = Field(
        65_536,
        ge=1,
        description="The tokens, as estimated, that may wait in one gateway: of queries, single texts and small "
        "requests, and as many of bulk requests. Beyond it a caller that has its share of them waiting is answered "
        "with status 429, and beyond twice as many everybody is.",
    )


class AuthSettings(_Section):
    """Who may call the HTTP port."""

    mode: Literal["loopback", "keys", "open"] = Field(
        "loopback",
        description="`loopback`: memserve listens on a loopback address only, and refuses requests that a web page of "
        "another origin makes through a browser on this machine; it asks for no key. `keys`: every request needs a "
        "key, which `memserve keys create` makes. `open`: everybody who reaches the port is admitted without a key, so "
        "put a server of your own in front that authenticates callers.",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="The origins, such as `https://app.example.com`, whose web pages may call memserve from a browser "
        "(CORS). By default none.",
    )


class LimitsSettings(_Section):
    """What one key may ask for if `auth.mode` is `keys`, and what one tenant may hold. By default there is no limit."""

    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="The requests that a key may make in a minute, unless the key has a limit of its own. A key that "
        "was not used for a minute may make them all at once. Beyond it a request is answered with status 429 and the "
        "code `rate_limit_exceeded`.",
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        description="The tokens that a key may have embedded in a minute, unless the key has a limit of its own. A "
        "request is admitted by an estimate, and charged what it took.",
    )
    memories_per_tenant: int | None = Field(
        None,
        ge=0,
        description="The memories that a tenant may hold. A write that would exceed it is answered with status 403 and "
        "the code `quota_exceeded`. It holds without keys, too, where all users are of one tenant.",
    )
    bytes_per_tenant: int | None = Field(
        None,
        ge=0,
        description="The bytes of texts, metadata and vectors that a tenant's memories may take in the log, likewise. "
        "The history of memories is not counted.",
    )
    keys_per_tenant: int | None = Field(
        None,
        ge=0,
        description="The keys, neither revoked nor expired, up to which the admins of a tenant may make keys. Each key "
        "has limits of its own. `memserve keys` and handle calls are not bound by it.",
    )


class AuditSettings(_Section):
    """The record of writes, of keys, and of refused requests, if `auth.mode` is `keys`."""

    days: int = Field(
        30,
        ge=0,
        le=36_500,
        description="How long events are kept, in days. With 0 none are kept.",
    )


class Settings(BaseSettings):
    """All settings."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
        protected_namespaces=(),
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = Field(
        None,
        description="The least severe messages of memserve that replicas log. By default the level of Serve's "
        "`logging_config`.",
    )
    model: ModelSettings = ModelSettings()
    queue: QueueSettings = QueueSettings()
    cache: CacheSettings = CacheSettings()
    embedder: EmbedderSettings = EmbedderSettings()
    reranker: RerankerSettings = RerankerSettings()
    store: StoreSettings = StoreSettings()
    gateway: GatewaySettings = GatewaySettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitsSettings = LimitsSettings()
    audit: AuditSettings = AuditSettings()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, values: Any) -> Any:
        """Refuse an environment variable with a mistyped section, which pydantic-settings would ignore."""
        for variable in os.environ:
            if variable.startswith(ENV_PREFIX) and variable not in CLIENT_VARIABLES:
                section = variable.removeprefix(ENV_PREFIX).split("__")[0].lower()
                if section not in cls.model_fields:
                    raise ValueError(f"environment variable {variable}: unknown setting `{section}`")
        return values


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, in one line that begins with its path: `model.nmae: unknown setting`."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown setting"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def load(args: Mapping[str, Any]) -> Settings:
    """Settings from `args:`, the environment and the defaults. Raises pydantic's ValidationError."""
    return Settings.model_validate({str(name): value for name, value in args.items()})


def with_user_config(settings: Settings, deployment: str, user_config: Mapping[str, Any] | None) -> Settings:
    """Settings changed by the `user_config:` of a deployment, which is written like `args:`.

    Raises:
        KeyError: there is no such deployment.
        ValueError: in one line, the first setting that is invalid or cannot change while the server runs.
    """
    if not isinstance(user_config, Mapping | None):
        raise ValueError(f"user_config of {deployment}: must be a mapping")
    values = settings.model_dump()
    allowed = RELOADABLE[deployment]
    for path, value in _paths(user_config or {}):
        if path not in allowed:
            raise ValueError(
                f"user_config of {deployment}: {path}: not a setting that can change while the server runs"
            )
        *sections, name = path.split(".")
        section = values
        for step in sections:
            section = section[step]
        section[name] = value
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"user_config of {deployment}: {first_problem(error)}") from error


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def absolute_log_url(url: str, base: Path) -> str:
    """The URL with a relative SQLite path made absolute against `base`, so that every replica opens the same file."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url.startswith("sqlite:////"):
        return url
    return f"{prefix}{base / url.removeprefix(prefix)}"
