"""AgentMem's interface, on a memserve in process or on a server.

    memory = (
        memserve.Memory.builder()
        .with_storage("memory://")
        .with_embedder("sentence-transformers", "all-MiniLM-L6-v2")
        .enable_embedding_queue(32, 10)
        .build()
    )
    memory.add_for_user("Anna plays the cello.", "anna")
    print(memory.search("music", user_id="anna", limit=1)[0])

The queue means what it means in AgentMem: texts that are added at the same time share a run of the model. Its size and
its wait are upper bounds: a run holds at most `max_batch_size` texts, and a text that arrives while the model is idle
does not wait at all.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from os import PathLike
from typing import Any, Self, TypeVar

from memserve.calls import Awaiting, Blocking, Calls, Steps, call
from memserve.client import AsyncClient, Client, needs_server
from memserve.results import Added, Memory

T = TypeVar("T")

DEFAULT_USER = "default"
_PROVIDERS = {"sentence-transformers": "local", "openai": "openai", "fake": "fake"}
_OPENAI = "https://api.openai.com/v1"

Memories = list[Memory]
AddedList = list[Added]


class _Methods:
    """The methods, each written once. `user_id` is `default` if it is not given."""

    _client: Any

    @call
    def add_for_user(self, text: str, user_id: str, **fields: Any) -> Steps[Added]:
        """Add a text of a user, with fields of a memory such as `metadata`."""
        (added,) = yield from Calls.add(self._client, user_id, [{"text": text, **fields}])
        return added

    @call
    def add(self, text: str, *, user_id: str = DEFAULT_USER, **fields: Any) -> Steps[Added]:
        """Add a text, with fields of a memory such as `metadata`."""
        (added,) = yield from Calls.add(self._client, user_id, [{"text": text, **fields}])
        return added

    @call
    def add_batch_optimized(
        self, texts: Sequence[str | Mapping[str, Any]], *, user_id: str = DEFAULT_USER, **options: Any
    ) -> Steps[AddedList]:
        """Add many texts at once; mappings with `text` have other fields, too."""
        added: AddedList = yield from Calls.add(self._client, user_id, texts, **options)
        return added

    @call
    def search(self, query: str, *, user_id: str = DEFAULT_USER, limit: int = 10, **options: Any) -> Steps[Memories]:
        """At most `limit` memories that match a text, the best first."""
        found: Memories = yield from Calls.search(self._client, user_id, query, top_k=limit, **options)
        return found

    @call
    def get(self, memory_id: str, *, user_id: str = DEFAULT_USER) -> Steps[Memory]:
        """One memory. Raises NotFound."""
        found: Memory = yield from Calls.get(self._client, user_id, memory_id)
        return found

    @call
    def get_all(self, *, user_id: str = DEFAULT_USER, limit: int | None = None, **options: Any) -> Steps[Memories]:
        """All memories of a user, the newest first; at most `limit`."""
        pages = Calls.list(self._client, user_id, **options)
        request, found = pages.request, Memories()
        while request is not None and (limit is None or len(found) < limit):
            answer = yield request
            found += pages.found(answer)
            request = pages.after(answer)
        return found[:limit]

    @call
    def update(self, memory_id: str, text: str, *, user_id: str = DEFAULT_USER, **changes: Any) -> Steps[Memory]:
        """Replace the text of a memory. Raises NotFound."""
        changed: Memory = yield from Calls.update(self._client, user_id, memory_id, text=text, **changes)
        return changed

    @call
    def delete(self, memory_id: str, *, user_id: str = DEFAULT_USER) -> Steps[None]:
        """Delete one memory. Raises NotFound."""
        yield from Calls.delete(self._client, user_id, memory_id)

    @call
    def delete_all(self, *, user_id: str = DEFAULT_USER) -> Steps[int]:
        """Delete everything of a user. Returns the number of memories."""
        deleted = yield from Calls.delete_user(self._client, user_id)
        return int(deleted.deleted)


class MemoryStore(Blocking, _Methods):
    """The interface, blocking. Made by `Memory.builder()`. `client` has the other calls of memserve."""

    def __init__(self, client: Client) -> None:
        self.client = self._client = client

    def _run(self, steps: Steps[T]) -> T:
        return self.client._run(steps)

    def close(self) -> None:
        """Close the store, or the connections to the server."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncMemoryStore(Awaiting, _Methods):
    """The interface, to await. Made by `Memory.builder()`. `client` has the other calls of memserve."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = self._client = client

    def _run(self, steps: Steps[T]) -> Coroutine[Any, Any, T]:
        return self.client._run(steps)

    async def close(self) -> None:
        """Close the store, or the connections to the server."""
        await self.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Builder:
    """Builds a memory store. By default in process, in the folder `./memories`, with the model of memserve."""

    def __init__(self) -> None:
        self._storage: str | PathLike[str] = "./memories"
        self._model: dict[str, Any] = {}
        self._queue_enabled = True
        self._max_batch_size: int | None = None
        self._server: tuple[str, str | None] | None = None

    def with_storage(self, url: str | PathLike[str]) -> Self:
        """A folder, `memory://`, or the URL of a log: see `Client.local`."""
        self._storage = url
        return self

    def with_embedder(self, provider: str, model: str, *, base_url: str | None = None) -> Self:
        """The model that makes the vectors.

        Args:
            provider: `sentence-transformers`, or `openai` with the key in OPENAI_API_KEY.
            model: the folder or the name of the model.
            base_url: of another server with OpenAI's API.

        Raises:
            ValueError: there is no such provider.
        """
        if provider not in _PROVIDERS:
            raise ValueError(f"There is no provider {provider!r}: use {' or '.join(map(repr, _PROVIDERS))}.")
        self._model = {"provider": _PROVIDERS[provider], "name": model}
        if provider == "openai":
            self._model["base_url"] = base_url or _OPENAI
        return self

    def enable_embedding_queue(self, max_batch_size: int = 32, max_wait_ms: float = 10) -> Self:
        """Let texts that are added at the same time share a run of the model.

        Args:
            max_batch_size: the most texts in one run.
            max_wait_ms: the longest time that a text waits for others while the model is idle. None waits at all.

        Raises:
            ValueError: a number is not positive.
        """
        if max_batch_size < 1 or max_wait_ms < 0:
            raise ValueError("max_batch_size must be at least 1, and max_wait_ms at least 0.")
        self._queue_enabled, self._max_batch_size = True, max_batch_size
        return self

    def disable_embedding_queue(self) -> Self:
        """Run the model once for each call."""
        self._queue_enabled = False
        return self

    def with_server(self, url: str, api_key: str | None = None) -> Self:
        """Use a server. It has its own storage, model and queue, so those that are set here have no effect."""
        self._server = url, api_key
        return self

    def build(self) -> MemoryStore:
        """A store that blocks. Its errors are those of `Client.local`."""
        if self._server is not None:
            return MemoryStore(Client(*self._server))
        with needs_server():
            from memserve.in_process import LocalTransport

        return MemoryStore(Client.over(LocalTransport(self._storage, None, self._settings(), self._max_batch_size)))

    async def build_async(self) -> AsyncMemoryStore:
        """A store to await. Its errors are those of `Client.local`."""
        if self._server is not None:
            return AsyncMemoryStore(AsyncClient(*self._server))
        with needs_server():
            from memserve.in_process import AsyncLocalTransport

        client = AsyncClient.over(AsyncLocalTransport(self._storage, None, self._settings(), self._max_batch_size))
        try:
            await client.ready()
        except BaseException:
            await client.close()
            raise
        return AsyncMemoryStore(client)

    def _settings(self) -> dict[str, Any]:
        return {"model": self._model, "queue": {"enabled": self._queue_enabled}}
