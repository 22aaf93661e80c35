"""The calls of the client, each written once. `Client` executes them, and `AsyncClient` does the same with await.

A call is a generator. It yields requests and batches of requests, is sent their answers, and returns its result. The
two clients differ only in how they execute what is yielded (memserve/client.py).

Options have the names of the fields in the HTTP API. An option that is not declared here is sent as it is, and a server
that does not have it answers 400. None means that an option is not sent. Only `update(expires_at=None)` sends it.
"""

from __future__ import annotations

import functools
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import datetime
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

import numpy as np

from memserve import results
from memserve.errors import BadRequest
from memserve.requests import Batch, Download, Lines, Pages, Piece, Request, Upload, to_json

P = ParamSpec("P")
T = TypeVar("T")

Steps = Generator[Request | Batch, Any, T]
"""A call: yields requests, is sent the answers, returns its result."""

MAX_ITEMS = 2_048
"""A list with more texts or memories goes in pieces: the server takes no more in one request."""

MAX_BYTES = 8 * 1024 * 1024
"""A list with more bytes of JSON goes in pieces: the server takes 16 MiB in one request, by default."""

MAX_IDS = 1_000
"""A list with more ids goes in pieces: the server takes no more in one request."""

PIECE_ITEMS = 512
PIECE_BYTES = 2 * 1024 * 1024

NewMemories = Sequence[str | Mapping[str, Any]]
Time = datetime | str
AddedList = list[results.Added]  # the class has a method `list`
MemoryList = list[results.Memory]
RankedList = list[results.Ranked]
Items = list[Any]


class Blocking:
    """The base of classes whose calls block."""


class Awaiting:
    """The base of classes whose calls are awaited."""


class call(Generic[P, T]):
    """A call as a method: `Client` blocks in it, `AsyncClient` awaits it."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._steps = steps

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:  # for help() and documentation tools
            return self._steps

        @functools.wraps(self._steps)
        def run(*args: P.args, **options: P.kwargs) -> Any:
            return client._run(self._steps(client, *args, **options))

        return run


class iterator(Generic[P, T]):
    """A list as a method, from its description: an iterator in `Client`, an async iterator in `AsyncClient`."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Pages[T] | Download[T]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self._describe

        @functools.wraps(self._describe)
        def iterate(*args: P.args, **options: P.kwargs) -> Any:
            described = self._describe(client, *args, **options)
            return client._pages(described) if isinstance(described, Pages) else client._download(described)

        return iterate


class Calls:
    """The calls. Their errors are those of memserve/errors.py."""

    _show_progress: bool | None

    # Embedding.

    @call
    def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: Literal["query", "document"] | None = None,
        truncate: Literal["end", "start", "none"] | None = None,
        dimensions: int | None = None,
        **options: Any,
    ) -> Steps[np.ndarray]:
        """Embed texts.

        A list of more than 2,048 texts or 8 MiB is sent in pieces, several at a time.

        Returns:
            (n, dim) float32, or (n, dimensions), in the order of `texts`. With the option `output_dtype` its type is
            int8 or uint8.
        """
        options = _given(input_type=input_type, truncate=truncate, dimensions=dimensions, **options)
        items = _items(texts, "input")
        if len(pieces := _pieces(items)) == 1:
            vectors: np.ndarray = yield Request("embed", items, **options)
            return vectors if vectors.flags.writeable else vectors.copy()  # Ray's arrays are read-only
        requests = [Piece(Request("embed", items[start:end], **options), start, end - start) for start, end in pieces]
        return np.concatenate((yield Batch(requests, "embedding", "text")))

    @call
    def rerank(
        self, query: str, documents: Sequence[str | Mapping[str, Any]], *, top_n: int | None = None, **options: Any
    ) -> Steps[RankedList]:
        """Sort documents by their relevance to a query, the most relevant first."""
        ranking = yield Request("rerank", query, _items(documents, "documents"), **_given(top_n=top_n, **options))
        return [results.Ranked(**ranked) for ranked in ranking]

    # Memories.

    @call
    def add(
        self,
        user_id: str,
        memories: NewMemories,
        *,
        on_duplicate: Literal["add", "skip"] | None = None,
        upsert: bool | None = None,
        **options: Any,
    ) -> Steps[AddedList]:
        """Add memories to a user: texts, or mappings with `text`, `id`, `metadata`, `expires_at` and other fields.

        When it returns, all of them are on disk. A list of up to 2,048 memories and 8 MiB is written as a whole or not
        at all. A longer one is sent in pieces: after an error, the pieces that were written before stay. Several pieces
        are sent at a time, unless a memory has a `thread`, in which the order counts.
        """
        items = [_new_memory(item) for item in _items(memories, "memories")]
        options = _given(on_duplicate=on_duplicate, upsert=upsert, **options)
        return (yield from _add("add", (user_id,), items, options))

    @call
    def add_many(
        self,
        memories: Sequence[Mapping[str, Any]],
        *,
        on_duplicate: Literal["add", "skip"] | None = None,
        upsert: bool | None = None,
        **options: Any,
    ) -> Steps[AddedList]:
        """Add memories of many users: mappings as in `add`, each with its `user_id`. See `add` for long lists."""
        items = [_new_memory(item) for item in _items(memories, "memories")]
        options = _given(on_duplicate=on_duplicate, upsert=upsert, **options)
        return (yield from _add("add_many", (), items, options))

    @call
    def search(
        self,
        user_id: str,
        query: str | None = None,
        *,
        vector: Sequence[float] | np.ndarray | None = None,
        mode: Literal["hybrid", "vector", "words"] | None = None,
        top_k: int | None = None,
        filter: Mapping[str, Any] | None = None,
        min_score: float | None = None,
        since: Time | None = None,
        until: Time | None = None,
        context: int | None = None,
        rerank: bool | None = None,
        explain: bool | None = None,
        include_vectors: bool | None = None,
        **options: Any,
    ) -> Steps[MemoryList]:
        """Search a user's memories by a text, or by `vector`. The best come first.

        A search sees every write that was answered before it. docs/search.md describes the options.
        """
        options = _given(
            vector=vector,
            mode=mode,
            top_k=top_k,
            filter=filter,
            min_score=min_score,
            since=since,
            until=until,
            context=context,
            rerank=rerank,
            explain=explain,
            include_vectors=include_vectors,
            **options,
        )
        found = yield Request("search", user_id, query, **options)
        return [results.Memory(**memory) for memory in found]

    @call
    def get(
        self, user_id: str, memory_id: str, *, include_vectors: bool | None = None, **options: Any
    ) -> Steps[results.Memory]:
        """One memory. Raises NotFound."""
        answer = yield Request("get", user_id, memory_id, **_given(include_vectors=include_vectors, **options))
        return results.Memory(**answer)

    @call
    def get_many(
        self, user_id: str, ids: Iterable[str], *, include_vectors: bool | None = None, **options: Any
    ) -> Steps[results.Got]:
        """Memories by their ids. More than 1,000 ids are sent in pieces, several at a time."""
        options = _given(include_vectors=include_vectors, **options)
        answers = yield _by_ids("get_many", user_id, ids, "reading", **options)
        memories = [results.Memory(**memory) for answer in answers for memory in answer["memories"]]
        return results.Got(memories=memories, missing=[id for answer in answers for id in answer["missing"]])

    @iterator
    def duplicates(
        self, user_id: str, *, score: float | None = None, limit: int | None = None, **options: Any
    ) -> Pages[Sequence[results.Memory]]:
        """Groups of memories that are nearly the same: the oldest first, then the newer ones with their `score`.

        They are read page by page, `limit` groups at a time. `score` is the least cosine similarity.
        """
        request = Request("duplicates", user_id, **_given(score=score, limit=limit, **options))
        return Pages(request, "groups", lambda group: [results.Memory(**memory) for memory in group["memories"]])

    @iterator
    def list(
        self,
        user_id: str,
        *,
        filter: Mapping[str, Any] | None = None,
        order: Literal["created_at", "-created_at", "updated_at", "-updated_at"] | None = None,
        limit: int | None = None,
        **options: Any,
    ) -> Pages[results.Memory]:
        """All memories of a user, the newest first. They are read page by page, `limit` at a time."""
        request = Request("list", user_id, **_given(filter=filter, order=order, limit=limit, **options))
        return Pages(request, "memories", lambda fields: results.Memory(**fields))

    @call
    def update(
        self,
        user_id: str,
        memory_id: str,
        *,
        text: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        metadata_merge: Mapping[str, Any] | None = None,
        if_version: int | None = None,
        **changes: Any,
    ) -> Steps[results.Memory]:
        """Change the fields of a memory that are given. With `expires_at=None` it no longer expires.

        A new text is embedded, unless its `vector` is given. With `if_version` another version is a Conflict.
        The answer has an empty text and empty metadata if the key has the scope `write` without `read`.
        """
        given = _given(text=text, metadata=metadata, metadata_merge=metadata_merge, if_version=if_version)
        answer = yield Request("update", user_id, memory_id, **given, **_plain(changes))
        return results.Memory(**{"text": "", "metadata": {}, **answer})

    @call
    def delete(self, user_id: str, memory_id: str) -> Steps[None]:
        """Delete one memory, and its text and metadata from its history. Raises NotFound."""
        yield Request("delete", user_id, memory_id)

    @call
    def delete_many(self, user_id: str, ids: Iterable[str]) -> Steps[results.Deleted]:
        """Delete memories by their ids. More than 1,000 ids are sent in pieces, several at a time."""
        answers = yield _by_ids("delete_many", user_id, ids, "deleting")
        return results.Deleted(
            deleted=sum(answer["deleted"] for answer in answers),
            missing=[id for answer in answers for id in answer["missing"]],
        )

    @call
    def delete_where(self, user_id: str, filter: Mapping[str, Any]) -> Steps[int]:
        """Delete the memories of a user that match a filter. Returns how many."""
        deleted: int = yield Request("delete_where", user_id, filter)
        return deleted

    @iterator
    def history(
        self, user_id: str, memory_id: str, *, limit: int | None = None, **options: Any
    ) -> Pages[results.Event]:
        """All states of one memory, the oldest first. They are read page by page, `limit` at a time."""
        request = Request("history", user_id, memory_id, **_given(limit=limit, **options))
        return Pages(request, "events", lambda fields: results.Event(**fields))

    # Users.

    @call
    def user(self, user_id: str) -> Steps[results.User]:
        """One user: how many memories, and their size. All is zero if the user has never had a memory."""
        return results.User(**(yield Request("user", user_id)))

    @iterator
    def users(self, *, prefix: str | None = None, limit: int | None = None, **options: Any) -> Pages[results.User]:
        """All users that have memories, by their ids. They are read page by page, `limit` at a time."""
        request = Request("users", **_given(prefix=prefix, limit=limit, **options))
        return Pages(request, "users", lambda fields: results.User(**fields))

    @call
    def delete_user(self, user_id: str) -> Steps[results.DeletedUser]:
        """Delete everything of a user."""
        return results.DeletedUser(**(yield Request("delete_user", user_id)))

    @iterator
    def export(self, user_id: str) -> Download[bytes]:
        """All memories of a user as NDJSON: one line for each memory, with its vector and history.

        Every line ends in a newline: `file.writelines(client.export("anna"))`.
        """
        return Download(Request("export", user_id), "exporting", bytes, self._show_progress)

    @call
    def import_(self, user_id: str, lines: Lines) -> Steps[results.Imported]:
        """Import memories into a user.

        Args:
            lines: the path of a file as `export` writes it, or lines of one, or mappings in their place. A line without
                a vector is embedded.

        The lines are sent in one request, which is sent again after an error if they can be read again: from a file or
        a list. If it fails, the lines before the failure are written. It may be repeated: lines that were written are
        `unchanged`.
        """
        upload = Upload(lines, "importing", self._show_progress)
        return results.Imported(**(yield Request("import_lines", user_id, upload)))

    # Keys, for which the client's own key needs the scope `admin`.

    @call
    def create_key(
        self,
        *,
        user_id: str | None = None,
        scopes: Sequence[str] | None = None,
        label: str | None = None,
        expires_at: Time | None = None,
        **options: Any,
    ) -> Steps[results.NewKey]:
        """Make a key of the client's own tenant, for all of its users or for one.

        It is not sent again after an error, as two keys would be made.
        """
        given = _given(user_id=user_id, label=label, expires_at=expires_at, **options)
        if scopes is not None:
            given["scopes"] = _items(scopes, "scopes")
        return results.NewKey(**(yield Request("create_key", **given)))

    @iterator
    def keys(self, *, limit: int | None = None, **options: Any) -> Pages[results.Key]:
        """All keys of the tenant, the newest first, those that were revoked or have expired included."""
        return Pages(Request("keys", **_given(limit=limit, **options)), "keys", lambda fields: results.Key(**fields))

    @call
    def revoke_key(self, key_id: str) -> Steps[results.Key]:
        """Revoke a key, by its public part. The server refuses it within five seconds. Raises NotFound."""
        return results.Key(**(yield Request("revoke_key", key_id)))

    # Operations.

    @call
    def ready(self) -> Steps[results.Ready]:
        """The model, if a text can be embedded and the log can be read. Raises Unavailable if not."""
        answer = yield Request("check_ready")
        return results.Ready(**{name: answer[name] for name in ("model", "device", "dtype")})


def _add(name: str, before: tuple[str, ...], items: Items, options: Mapping[str, Any]) -> Steps[AddedList]:
    pieces = _pieces(items)
    if len(pieces) == 1:
        added = yield Request(name, *before, items, **options)
        return [results.Added(**one) for one in added]
    requests = [Piece(Request(name, *before, items[start:end], **options), start, end - start) for start, end in pieces]
    answers = yield Batch(requests, "adding", "memory", in_order=_order_counts(items))
    return [results.Added(**one) for added in answers for one in added]


def _order_counts(items: Items) -> bool:
    """Whether a memory belongs to a thread, which has its memories in the order in which they were added."""
    return any(isinstance(item, Mapping) and item.get("thread") is not None for item in items)


def _by_ids(name: str, user_id: str, ids: Iterable[str], title: str, **options: Any) -> Batch:
    """A batch of requests for the distinct ids; of one request if they fit into it."""
    distinct = [*dict.fromkeys(_items(ids, "ids"))]
    starts = range(0, len(distinct), MAX_IDS) or [0]
    pieces = [(start, distinct[start : start + MAX_IDS]) for start in starts]
    requests = [Piece(Request(name, user_id, piece, **options), start, len(piece)) for start, piece in pieces]
    return Batch(requests, title, "memory")


def _items(given: Any, name: str) -> Items:
    """The items of a list. Raises BadRequest for a single item."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise BadRequest(f"{name}: must be a list", 400, name)
    return [*given]


def _new_memory(given: Any) -> Any:
    if isinstance(given, str):
        return {"text": given}
    return _plain(given) if isinstance(given, Mapping) else given


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return _plain({name: value for name, value in options.items() if value is not None})


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with times and arrays as JSON has them."""
    return {name: _plain_value(value) for name, value in fields.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _pieces(items: Items) -> list[tuple[int, int]]:
    """The pieces (start, end) in which a list is sent; one piece if the server takes it as a whole."""
    sizes = [len(to_json(item)) for item in items]
    if len(items) <= MAX_ITEMS and sum(sizes) <= MAX_BYTES:
        return [(0, len(items))]
    found: list[tuple[int, int]] = []
    start = size = 0
    for position, more in enumerate(sizes):
        if position > start and (position - start == PIECE_ITEMS or size + more > PIECE_BYTES):
            found.append((start, position))
            start, size = position, 0
        size += more
    return [*found, (start, len(items))]
