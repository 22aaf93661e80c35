"""The gateway and its routes in this process: no Ray, no HTTP server, a fake model and a real store on SQLite.

Calls between the deployments are pickled both ways, as they are between processes.
"""

import asyncio
import copy
import pickle
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from ray.exceptions import WorkerCrashedError

from deployments.api.build import build_api
from deployments.embedder import Embedder
from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.fake import FakeModel, FakeReranker
from deployments.gateway import Gateway
from deployments.settings import Settings
from deployments.store import StoreReplica
from store import NewKey
from tests.documented import Document

DIM = 32


class LocalEmbedder:
    """The Embedder deployment without its metrics. Calls wait for `gate`. `texts` is every input so far."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.engine = self._engine = Engine(self.model)
        self.texts: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def embed(self, requests: list[EmbedRequest]) -> Any:
        self.texts += [text for request in requests for text in request.inputs]
        await self.gate.wait()
        return await self.engine.embed(requests)

    async def info(self) -> Any:
        return self.engine.info

    split = Embedder.split
    count_tokens = Embedder.count_tokens
    decode = Embedder.decode


class Replica:
    """A handle to a deployment in this process. A call of the store's `run` has the name of the store's method.

    Attributes:
        calls: (name, session) of every call.
        die_before, die_after: names of calls whose replica dies before or after the call, once for each entry.
        after: by the name of a call, a coroutine to run after the call and before its answer.
    """

    def __init__(self, deployment: Any) -> None:
        self.deployment = deployment
        self.session: str | None = None
        self.calls: list[tuple[str, str | None]] = []
        self.die_before: list[str] = []
        self.die_after: list[str] = []
        self.after: dict[str, Callable[[], Awaitable[None]]] = {}

    def options(self, session_id: str | None = None, **_: Any) -> "Replica":
        other = copy.copy(self)  # the lists are the same
        other.session = session_id
        return other

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return _Method(self, method)


class _Method:
    def __init__(self, replica: Replica, method: str) -> None:
        self._replica = replica
        self._method = method

    async def remote(self, *args: Any, **options: Any) -> Any:
        replica = self._replica
        args, options = pickle.loads(pickle.dumps((args, options)))
        name = args[0] if self._method == "run" else self._method
        replica.calls.append((name, replica.session))
        self._die(replica.die_before, name)
        answer = await getattr(replica.deployment, self._method)(*args, **options)
        if name in replica.after:
            await replica.after[name]()
        self._die(replica.die_after, name)
        return pickle.loads(pickle.dumps(answer))

    @staticmethod
    def _die(names: list[str], name: str) -> None:
        if name in names:
            names.remove(name)
            raise WorkerCrashedError


_documents: list[Document] = []  # at most one, which all applications share: it takes a while to make


async def _read_metrics() -> bytes:
    return b"ray_memserve_queued_tokens 0.0\n"


class LocalApp:
    """One gateway, one embedder, one store and, unless `reranker.model` is None, one reranker.

    Attributes:
        api: the routes.
        http: a client of the routes, which checks every answer against the OpenAPI document.
        embedder, store: the handles.
        model, ranker: the embedder and the reranker themselves.
        errors: the errors that the routes reported to `on_error`.
    """

    @classmethod
    async def start(cls, folder: Path, **args: Any) -> "LocalApp":
        """An application on a log of its own."""
        self = cls()
        defaults = {"store": {"url": f"sqlite:///{folder}/log.db"}, "reranker": {"model": "fake-reranker"}}
        settings = Settings.model_validate({**defaults, **args})
        self.model = LocalEmbedder(FakeModel(DIM))
        self.ranker = LocalEmbedder(FakeReranker())
        self.embedder = Replica(self.model)
        deployment = StoreReplica.__new__(StoreReplica)
        await deployment.__init__(settings, self.embedder)  # type: ignore[misc]
        self.store = Replica(deployment)
        self.reranker = Replica(self.ranker)
        reranker = None if settings.reranker.model is None else self.reranker
        self.gateway = Gateway(settings, self.embedder, self.store, reranker)  # type: ignore[arg-type]
        self.errors: list[Exception] = []
        self.api = build_api(
            self.gateway,
            on_error=self.errors.append,
            find_key=self.gateway.find_key if settings.auth.mode == "keys" else None,
            rate_limits=self.gateway.rate_limits,
            max_body_bytes_in_flight=settings.gateway.max_body_bytes_in_flight,
            read_metrics=_read_metrics,
        )
        if not _documents:
            _documents.append(Document(self.api.openapi()))

        async def check_documented(answer: httpx.Response) -> None:
            await answer.aread()
            _documents[0].check(answer.request, answer)

        transport = httpx.ASGITransport(app=self.api, raise_app_exceptions=False)
        hooks = {"response": [check_documented]}
        self.http = httpx.AsyncClient(transport=transport, base_url="http://memserve", event_hooks=hooks)
        return self

    async def make_key(self, tenant: str, **options: Any) -> str:
        """The secret of a new key."""
        made: NewKey = await self.store.deployment.run("create_key", ("test", False, None, 1), tenant, **options)
        return made.secret

    async def stop(self) -> None:
        await self.http.aclose()
        self.store.deployment.__del__()
        await self.model.engine.close()
        await self.ranker.engine.close()
