"""A server whose replicas are added, removed, replaced and killed; a driver to deploy to it; and a load on it."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from deployments.serving import ray_internals
from tests.cluster.server import Server

DEPLOYMENTS = ("Embedder", "Gateway", "Store")
ARGS: dict[str, Any] = {
    "model": {"provider": "fake", "name": "fake", "dim": 256},  # enough that no two words are similar by chance
    "cache": {"max_bytes": 0},  # so that each text reaches an embedder
    "embedder": {"num_cpus": 0.15},
}
POLICY = {
    "policy_function": "deployments.serving.autoscaling:EmbedderPolicy",
    "policy_kwargs": {"target_drain_s": 1.0, "target_busy": 0.8},
}
SETTLED_WITHIN_S = 90.0


class Status(NamedTuple):
    """The application's status and message, and (status, message) of each deployment."""

    status: str
    message: str
    deployments: dict[str, tuple[str, str]]


def _connect(address: str) -> None:
    ray.init(address=address, namespace="serve", log_to_driver=False, logging_level="ERROR")


def _deploy(config: dict[str, Any]) -> None:
    ray_internals.deploy(ServeDeploySchema.model_validate(config))


def _status() -> Status:
    application = serve.status().applications["memserve"]
    return Status(
        application.status.value,
        application.message,
        {name: (one.status.value, one.message) for name, one in application.deployments.items()},
    )


class Elastic(Server):
    """A server with one replica of each deployment, or as many as `deploy` is told. The load changes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ARGS)
        self._base: dict[str, Any] = yaml.safe_load(self.config.read_text())
        self._wanted = dict.fromkeys(DEPLOYMENTS, 1)
        self.config.write_text(yaml.safe_dump(self.changed()))

    def changed(
        self,
        args: dict[str, Any] | None = None,
        replicas: dict[str, int] | None = None,
        user_configs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config with these args added, these numbers of replicas and these user_configs."""
        application = {**self._base["applications"][0]}
        application["args"] = {**ARGS, **(args or {})}
        application["deployments"] = [
            {
                "name": name,
                "autoscaling_config": {
                    "min_replicas": (replicas or {}).get(name, 1),
                    "max_replicas": (replicas or {}).get(name, 1) or 1,
                    "upscale_delay_s": 0.0,
                    "downscale_delay_s": 1.0,
                    "metrics_interval_s": 1.0,
                    "look_back_period_s": 3.0,
                    **({"policy": POLICY} if name == "Embedder" else {}),
                },
                **({"user_config": user_configs[name]} if user_configs and name in user_configs else {}),
            }
            for name in DEPLOYMENTS
        ]
        return {**self._base, "applications": [application]}

    def start(self) -> str:
        """Start, wait until it is ready, and connect a driver. Returns the ready line."""
        line = super().start()
        context = multiprocessing.get_context("spawn")
        self._driver = ProcessPoolExecutor(1, context, initializer=_connect, initargs=(self.ray_address(),))
        return line

    def stop(self, *args: int) -> int:
        """End the driver and the server. Returns the server's exit status."""
        self._driver.shutdown()
        return super().stop(*args)

    def deploy(self, **changes: Any) -> None:
        """Deploy the config with these changes, the arguments of `changed`."""
        self._wanted = {**dict.fromkeys(DEPLOYMENTS, 1), **changes.get("replicas", {})}
        self._driver.submit(_deploy, self.changed(**changes)).result(timeout=60)

    def status(self) -> Status:
        """The status that `serve status` shows."""
        return self._driver.submit(_status).result(timeout=60)

    def settle(self, within_s: float = SETTLED_WITHIN_S) -> None:
        """Wait until exactly the deployed replicas run. Serve stops counting a replica before its process has ended."""
        until(lambda: self.status().status == "RUNNING" and self._has_wanted(), within_s)

    def _has_wanted(self) -> bool:
        """Whether as many replicas run as were deployed. Of a deployment that may have none, one may run."""
        return all(len(self.replicas(name)) in {wanted, wanted or 1} for name, wanted in self._wanted.items())


def until(condition: Callable[[], bool], within_s: float) -> float:
    """Wait for a condition. Returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, "the condition was not met in time"
        time.sleep(0.1)
    return time.monotonic() - started


class Failure(NamedTuple):
    """A request that failed; `kind` is the status, or the name of the transport error."""

    what: str
    kind: str
    retry_after: str | None
    at_s: float


class Load:
    """Clients, each with a user of its own, that embed, add memories, and search for the acknowledged ones.

    A client repeats a request that failed until it succeeds. Wrong vectors and memories that are not found are
    collected in `wrong`. A memory that was stored twice or lost fails the check at the end.
    """

    def __init__(self, server: Server, name: str, clients: int = 4) -> None:
        self._server = server
        self._users = [f"{name}-{number}" for number in range(clients)]
        self._threads = [threading.Thread(target=self._client, args=(user,)) for user in self._users]
        self._end = threading.Event()
        self.acknowledged: dict[str, list[str]] = {user: [] for user in self._users}
        self.failures: list[Failure] = []
        self.wrong: list[str] = []
        self.answers = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        before = self.answers
        until(lambda: self.answers > before + len(self._users), 30.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in self._threads)
        if kind is None:
            self._check()

    def _client(self, user: str) -> None:
        vector = None
        with self._server.client() as http:
            while not self._end.is_set():
                embedded = self._ask(http, "embed", "/v1/embeddings", {"input": f"the text of {user}"})
                vector = vector or embedded["data"][0]["embedding"]
                if embedded["data"][0]["embedding"] != vector:
                    self.wrong.append(f"another vector for {user}")
                number = len(self.acknowledged[user])
                text = f"memory-{number}-of-{user}"
                (added,) = self._ask(http, "add", f"/v1/users/{user}/memories", {"text": text})["memories"]
                self.acknowledged[user].append(added["id"])
                query = {"query": text, "top_k": 1}
                found = self._ask(http, "search", f"/v1/users/{user}/memories/search", query)["results"]
                if [one["id"] for one in found] != [added["id"]]:
                    self.wrong.append(f"{text} is not found, but {found}")

    def _ask(self, http: httpx.Client, what: str, path: str, body: dict[str, Any]) -> Any:
        while True:
            try:
                answer = http.post(path, json=body)
            except httpx.TransportError as error:
                self.failures.append(Failure(what, type(error).__name__, None, time.monotonic()))
            else:
                if answer.is_success:
                    self.answers += 1
                    return answer.json()
                retry_after = answer.headers.get("retry-after")
                self.failures.append(Failure(what, str(answer.status_code), retry_after, time.monotonic()))
            time.sleep(0.05)

    def _check(self) -> None:
        """Check that every acknowledged memory is listed exactly once."""
        assert not self.wrong, self.wrong[:3]
        with self._server.client() as http:
            for user, acknowledged in self.acknowledged.items():
                listed, cursor = [], None
                while True:
                    more = {"cursor": cursor} if cursor else {}
                    page = http.get(f"/v1/users/{user}/memories", params={"limit": 100, **more}).json()
                    listed += [memory["id"] for memory in page["memories"]]
                    if (cursor := page["next_cursor"]) is None:
                        break
                assert sorted(listed) == sorted(acknowledged), user
