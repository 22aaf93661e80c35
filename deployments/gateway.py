"""The Gateway deployment: the HTTP ingress and the handle API. Validates, coalesces, calls.

Bad input is refused here, before it joins a batch with anybody else's. Nothing is acknowledged before the log has
committed it. The routes (deployments/api/build.py) and the handle API are two ways into the same few methods, so that
both have the same validation and the same errors.
"""

import asyncio
import itertools
import re
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from deployments import metrics
from deployments.api.build import build_api
from deployments.calls.embedder import EmbedderCalls
from deployments.calls.store import StoreCalls
from deployments.calls.transfer import Piece, export_pieces, import_pieces, one_line
from deployments.calls.vectors import PathOf, Vectors, join
from deployments.embedding import outputs
from deployments.embedding.model import ModelInfo, TextToken, Truncate
from deployments.errors import InvalidRequest, MemserveError, Unavailable
from deployments.requests import bodies
from deployments.requests.origin import Origin
from deployments.serving import logs, protocol
from deployments.serving.autoscaling import WAITING_TOKENS
from deployments.serving.garbage import collect_old_seldom
from deployments.serving.live_settings import LiveSettings
from deployments.settings import EmbedderSettings, Settings
from store import (
    Append,
    AppendResult,
    Conflict,
    ExportCursor,
    ExportPage,
    Imported,
    NewMemory,
    NotFound,
    Search,
    SearchResult,
    Store,
    StoreError,
)

TENANT = "default"
READY_TIMEOUT_S = 1.5  # "no" is the answer within two seconds

Fields = dict[str, Any]
Rows = list[Fields]  # the class has a `list` of its own
Positions = list[int]


class Gateway:
    """One replica of the ingress."""

    def __init__(self, settings: Settings, embedder: DeploymentHandle, store: DeploymentHandle) -> None:
        logs.attach(settings.log_level)
        collect_old_seldom()
        options = settings.gateway
        self._live = LiveSettings(settings, "Gateway")
        self._embedder = EmbedderCalls(
            embedder,
            in_flight=options.embed_calls_in_flight or _calls_in_flight(settings.embedder),
            call_tokens=options.embed_call_tokens,
            max_queued_tokens=options.max_queued_tokens,
            cache_bytes=settings.cache.max_bytes,
        )
        self._store = StoreCalls(
            store,
            partitions=settings.store.partitions,
            append_in_flight=options.append_calls_in_flight,
            append_memories=options.append_call_memories,
        )
        self._metrics = metrics.GatewayMetrics(self._embedder.cache)
        self.vectors = Vectors(self._embedder, self._metrics)

    # Serve runs a method that is not async in a thread, away from the event loop that the queues belong to.
    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls this after the constructor and whenever `user_config` has changed."""
        if self._live.take(user_config):
            settings = self._live.settings
            options = settings.gateway
            self._embedder.reconfigure(
                in_flight=options.embed_calls_in_flight or _calls_in_flight(settings.embedder),
                call_tokens=options.embed_call_tokens,
                max_queued_tokens=options.max_queued_tokens,
                cache_bytes=settings.cache.max_bytes,
            )
            self._store.reconfigure(
                append_in_flight=options.append_calls_in_flight, append_memories=options.append_call_memories
            )

    @property
    def max_body_bytes(self) -> int:
        """The largest request body that is read."""
        return self._live.settings.gateway.max_body_bytes

    # Serve calls this after the constructor and serves what it returns (ray.serve.ingress without an app).
    def __serve_build_asgi_app__(self) -> FastAPI:
        protocol.install()
        return build_api(self, on_error=metrics.count_error)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks for each second, for deployments/serving/autoscaling.py: most of a backlog waits here."""
        waiting = self.vectors.queued_tokens
        self._metrics.queue(waiting)
        return {WAITING_TOKENS: waiting}

    # The handle API. A write that is given an `Origin.of_key` can be sent again, and is made once.

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: Literal["query", "document"] | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Returns:
            (n, dim) float32, or (n, dimensions), in the order of `texts`.

        Raises:
            InvalidRequest: no list, an empty text, too many texts, an unknown option; `param` names it.
        """
        values = {
            "input": _items(texts, "input"),
            "input_type": input_type,
            "truncate": truncate,
            "dimensions": dimensions,
        }
        body = bodies.check(bodies.EmbeddingsBody, values)
        result = await self.vectors.of_inputs(body, lambda n: f"input.{n}")
        return outputs.cut(result.vectors, body.dimensions)

    async def add(
        self,
        user_id: str,
        memories: Sequence[str | Mapping[str, Any]],
        *,
        on_duplicate: Literal["add", "skip"] = "add",
        upsert: bool = False,
        origin: Origin | None = None,
    ) -> list[dict[str, Any]]:
        """Add memories (texts, or mappings with text, id, metadata, expires_at, vector) to one user.

        Returns:
            `{id, status, version}` of each, in order, once they are committed.

        Raises:
            InvalidRequest: `param` names the field. store.Conflict: an id is taken by other content.
        """
        items = [{"text": item} if isinstance(item, str) else item for item in _items(memories, "memories")]
        body = bodies.check(bodies.AddBody, {"memories": items, "on_duplicate": on_duplicate, "upsert": upsert})
        groups = [(_new_user(user_id), body.items())]
        (result,) = await self.append(groups, body, lambda n: f"memories.{n}", origin or Origin.fresh())
        return [bodies.appended(entry) for entry in result.memories]

    async def add_many(
        self, memories: Sequence[Mapping[str, Any]], *, origin: Origin | None = None, **options: Any
    ) -> Rows:
        """Add memories of many users (mappings as in `add`, each with its user_id), all or none of them.

        Returns:
            `{user_id, id, status, version}` of each, in order, once they are committed.

        Raises:
            InvalidRequest, store.Conflict: `param` names the memory by its position.
        """
        body = bodies.check(bodies.AddManyBody, {"memories": _items(memories, "memories"), **options})
        return await self.append_many(body, origin or Origin.fresh())

    async def search(self, user_id: str, query: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """Search one user's memories by text, or by `vector=`; the other options are those of SearchBody.

        Returns:
            memories with their score (cosine similarity), best first.
        """
        body = bodies.check(bodies.SearchBody, {"query": query, **options})
        return [bodies.memory(found) for found in (await self.find(_user(user_id), body)).results]

    async def get(self, user_id: str, memory_id: str, **options: Any) -> Fields:
        """One memory, with its vector if `include_vectors`. Raises store.NotFound."""
        path, query = _memory(user_id, memory_id), bodies.check(bodies.GetQuery, options)
        vector = query.include_vectors
        return bodies.memory(await self._store.run_warm(Store.get, TENANT, *path, include_vector=vector))

    async def list(self, user_id: str, **options: Any) -> Fields:
        """`{memories, next_cursor}`: a page of one user's memories; the options are those of ListQuery."""
        query = bodies.check(bodies.ListQuery, options)
        page = await self._store.run_warm(Store.list, TENANT, _user(user_id), **query.model_dump())
        return {"memories": [bodies.memory(found) for found in page.memories], "next_cursor": page.next_cursor}

    async def update(self, user_id: str, memory_id: str, *, origin: Origin | None = None, **changes: Any) -> Fields:
        """Change a memory's text, metadata or expires_at, those that are given; with `if_version` only that version.

        A new text is embedded; one that is the same already keeps the vector that it has.

        Raises:
            store.NotFound. store.Conflict: the memory has another version than `if_version`.
        """
        origin = origin or Origin.fresh()
        path = _memory(user_id, memory_id)
        given = bodies.check(bodies.UpdateBody, changes).model_dump(exclude_unset=True)
        while True:
            try:
                changed = await self._store.write(
                    Store.update,
                    TENANT,
                    *path,
                    issued_at=origin.issued_at,
                    write_id=origin.write_id,
                    **await self._fields(path, given),
                )
            except Conflict as error:  # the version may be ours, of `_fields`: look again
                if error.code != "version_mismatch" or "if_version" in given:
                    raise
            else:
                return bodies.memory(changed)

    async def delete(self, user_id: str, memory_id: str, *, origin: Origin | None = None) -> None:
        """Delete one memory of one user. Raises store.NotFound."""
        write_id = (origin or Origin.fresh()).write_id
        await self._store.write(Store.delete, TENANT, *_memory(user_id, memory_id), write_id=write_id)

    async def delete_where(self, user_id: str, filter: Mapping[str, Any], *, origin: Origin | None = None) -> int:
        """Delete the memories of one user that match. Returns how many."""
        body = bodies.check(bodies.DeleteBody, {"filter": filter})
        write_id = (origin or Origin.fresh()).write_id
        return await self._store.write(Store.delete_where, TENANT, _user(user_id), body.filter, write_id=write_id)

    async def delete_user(self, user_id: str, *, origin: Origin | None = None) -> Fields:
        """Delete everything of one user. `{deleted, version}`."""
        write_id = (origin or Origin.fresh()).write_id
        deleted, version = await self._store.write(Store.erase_user, TENANT, _user(user_id), write_id=write_id)
        return {"deleted": deleted, "version": version}

    async def history(self, user_id: str, memory_id: str) -> Rows:
        """The states of one memory, oldest first: `{event, at, version, text, metadata}`. Raises store.NotFound."""
        events = await self._store.run_warm(Store.history, TENANT, *_memory(user_id, memory_id))
        return [bodies.history_event(event) for event in events]

    async def user(self, user_id: str) -> Fields:
        """`{user_id, memories, version, bytes, index, resident}`; all empty for a user that never was."""
        stats = await self._store.run_warm(Store.user, TENANT, _user(user_id))
        return {**bodies.user_in_log(stats), "index": stats.index, "resident": stats.resident}

    async def users(self, **options: Any) -> Fields:
        """`{users, next_cursor}`: a page of the users that have memories; the options are those of UsersQuery."""
        query = bodies.check(bodies.UsersQuery, options)
        page = await self._store.run(Store.users, TENANT, **query.model_dump())
        return {"users": [bodies.user_in_log(stats) for stats in page.users], "next_cursor": page.next_cursor}

    async def export(self, user_id: str) -> AsyncIterator[bytes]:
        """NDJSON of one user's memories, some lines at a time; over a handle with `options(stream=True)`."""
        user = _user(user_id)

        async def page_after(cursor: ExportCursor | None) -> ExportPage:
            return await self._store.run_warm(Store.export_page, TENANT, user, cursor)

        async for piece in export_pieces(page_after):
            yield piece

    async def import_lines(
        self, user_id: str, lines: Sequence[str | bytes | Mapping[str, Any]], *, origin: Origin | None = None
    ) -> Fields:
        """Import lines of NDJSON, or mappings in their place. `{imported, unchanged}`; see calls/transfer.py."""

        items = _items(lines, "lines")

        async def chunks() -> AsyncIterator[bytes]:
            for number, line in enumerate(items):
                yield one_line(line, f"lines.{number}")

        return await self.take_in(_new_user(user_id), chunks(), origin or Origin.fresh())

    # What the routes and the handle API share. Arguments are validated.

    async def model_info(self) -> ModelInfo:
        """What the model is."""
        return await self._embedder.info()

    async def split(self, texts: Sequence[str], special: bool, path_of: PathOf) -> Sequence[Sequence[TextToken]]:
        """The tokens of each text with their places in it; `special` ones, too."""
        return await self._embedder.split(texts, special, path_of)

    async def decode(self, ids: Sequence[Sequence[int]], path_of: PathOf) -> Sequence[str]:
        """The text of each list of token ids."""
        return await self._embedder.decode(ids, path_of)

    async def append(
        self,
        groups: Sequence[tuple[str, Sequence[bodies.NewMemoryBody]]],
        options: bodies.AddBody | bodies.AddManyBody,
        path_of: PathOf,
        origin: Origin,
    ) -> Sequence[AppendResult]:
        """Embed what has no vector yet, then commit the groups of all users, or none; `path_of(n)` names a memory."""
        items = [item for _, group in groups for item in group]
        vectors = iter(await self.vectors.of_memories(items, path_of))
        numbers = itertools.count()
        # What only adds, under ids that were made for it, needs no record: that they are in the log says it was done,
        # and where its user was erased since, its time does. A client's key brings another time along.
        only_adds = not origin.has_key and options.on_duplicate == "add" and not any(item.id for item in items)
        write_id = None if only_adds else origin.write_id
        appends = [
            Append(
                tenant=TENANT,
                user_id=user_id,
                memories=tuple(
                    NewMemory(
                        id=item.id or origin.memory_id(number),
                        generated_id=item.id is None,
                        text=item.text,
                        vector=next(vectors),
                        metadata=item.metadata,
                        expires_at=item.expires_at,
                    )
                    for item, number in zip(group, numbers, strict=False)
                ),
                on_duplicate=options.on_duplicate,
                upsert=options.upsert,
                issued_at=origin.issued_at,
                write_id=write_id,
            )
            for user_id, group in groups
        ]
        try:
            return await self._store.append(appends)
        except StoreError as error:
            raise _renamed(error, path_of, one_user=isinstance(options, bodies.AddBody)) from error

    async def append_many(self, body: bodies.AddManyBody, origin: Origin) -> Rows:
        """Add memories of many users, grouped by user on their way and answered in their own order."""
        positions: defaultdict[str, Positions] = defaultdict(Positions)
        for position, item in enumerate(body.memories):
            positions[item.user_id].append(position)
        groups = [(user_id, [body.memories[n] for n in taken]) for user_id, taken in positions.items()]
        order = [position for taken in positions.values() for position in taken]
        results = await self.append(groups, body, lambda n: f"memories.{order[n]}", origin)
        entries = [entry for result in results for entry in result.memories]
        answers = dict(zip(order, entries, strict=True))
        return [{"user_id": item.user_id, **bodies.appended(answers[n])} for n, item in enumerate(body.memories)]

    async def find(self, user_id: str, body: bodies.SearchBody) -> SearchResult:
        """The nearest memories of one user."""
        return await self._store.search(
            Search(
                tenant=TENANT,
                user_id=user_id,
                vector=await self.vectors.of_search(body),
                top_k=body.top_k,
                filter=body.filter,
                min_score=body.min_score,
                include_vectors=body.include_vectors,
            )
        )

    async def take_in(self, user_id: str, chunks: AsyncIterable[bytes], origin: Origin) -> Fields:
        """Import NDJSON that is cut anywhere, as it arrives."""
        begin = True

        async def write(piece: Piece) -> Imported:
            nonlocal begin
            done = await self._store.write(
                Store.import_lines,
                TENANT,
                user_id,
                piece.lines,
                first=piece.first,
                begin=begin,
                issued_at=origin.issued_at,
            )
            begin = False
            return done

        done = await import_pieces(chunks, max_line_bytes=self.max_body_bytes, embed=self.vectors.of_texts, write=write)
        return {"imported": done.imported, "unchanged": done.unchanged}

    async def check_ready(self) -> Fields:
        """Ask an embedder and a store whether they are there. Returns `{model, device, dtype}`.

        Embedders that may be none (`min_replicas: 0`) are not asked: a request will start one, a probe must not.

        Raises:
            Unavailable: with what is missing.
        """
        checks = {"store": self._store.ping}
        if self._live.settings.embedder.min_replicas > 0:
            checks["embedder"] = self._embedder.ping

        async def missing(name: str, check: Callable[[], Awaitable[None]]) -> str | None:
            try:
                await asyncio.wait_for(check(), READY_TIMEOUT_S)
            except TimeoutError:
                return f"{name}: no answer within {READY_TIMEOUT_S:g} s"
            except (MemserveError, StoreError) as error:
                return f"{name}: {error}"
            return None

        found = await asyncio.gather(*(missing(*check) for check in sorted(checks.items())))
        if reasons := [reason for reason in found if reason]:
            raise Unavailable(f"Not ready. {'; '.join(reasons)}", None, "not_ready")
        info = self._embedder.known
        if info is None:
            return {"model": self._live.settings.model.name, "device": "none yet", "dtype": "none yet"}
        return {"model": info.name, "device": info.device, "dtype": info.dtype}

    async def _fields(self, path: tuple[str, str], given: Fields) -> Fields:
        """The changes as the store takes them: a new text with its vector; one that is there already as a version."""
        if "text" not in given:
            return given
        try:
            found = await self._store.run_warm(Store.get, TENANT, *path)
        except NotFound:  # or deleted since the change was made: the log knows
            found = None
        if found is not None and given["text"] == found.text:
            return {"if_version": found.version, **{name: given[name] for name in given if name != "text"}}
        (vector,) = await self.vectors.of_texts([given["text"]], lambda _: "text")
        return {**given, "vector": vector}


def _calls_in_flight(embedder: EmbedderSettings) -> int:
    """Calls that keep every replica busy.

    On a CPU one each fills its batches best where the texts are few, since the cores have other work while an answer
    travels; what makes a batch by itself is sent ahead. A GPU would stand idle meanwhile: two.
    """
    return (embedder.max_replicas or 1) * (2 if embedder.num_gpus else 1)


def _items(given: Any, param: str) -> list[Any]:
    """The items of a handle call's list; a lone one is none. A mapping among them becomes a dict."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise InvalidRequest("must be a list", param)
    return [dict(item) if isinstance(item, Mapping) else item for item in given]


def _new_user(user_id: str) -> str:
    return bodies.check(bodies.NewUserPath, {"user_id": user_id}).user_id


def _user(user_id: str) -> str:
    return bodies.check(bodies.UserPath, {"user_id": user_id}).user_id


def _memory(user_id: str, memory_id: str) -> tuple[str, str]:
    path = bodies.check(bodies.MemoryPath, {"user_id": user_id, "memory_id": memory_id})
    return path.user_id, path.memory_id


def _renamed(error: StoreError, path_of: PathOf, *, one_user: bool) -> StoreError:
    """The store's `memories.N.field` as the caller knows it."""
    match = re.fullmatch(r"memories\.(\d+)\.(.+)", error.param or "")
    if match is None:
        return error
    in_path = one_user and match[2] == "user_id"
    return type(error)(error.message, match[2] if in_path else join(path_of(int(match[1])), match[2]), error.code)
