"""memserve without HTTP and without Serve: the calls that HTTP routes and handles have in common.

Guarantees:
- Invalid input is refused here, before it shares a batch with the input of other callers.
- A write is acknowledged only after the log has committed it.
- HTTP routes and handle calls validate alike and raise the same errors. An error has the path of its field in the
  caller's request.

Nothing here is durable: a call that waits is lost with the process. HAProxy or the client may send it again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deployments import shapes
from deployments.calls.transfer import LongLines, export_pieces, import_pieces, to_line
from deployments.embedding import outputs
from deployments.embedding.model import ModelInfo, TextToken, Truncate
from deployments.errors import MemserveError, Unavailable, located, renumbered
from deployments.fair_queue import Turn, deadline_of_request
from deployments.requests import arguments, bodies, deadlines
from deployments.requests.origin import Origin
from deployments.shapes import Fields
from store import (
    Append,
    AppendResult,
    Conflict,
    ExportCursor,
    ExportPage,
    Imported,
    ImportLine,
    NewMemory,
    NotFound,
    Search,
    Store,
    StoreError,
)

if TYPE_CHECKING:  # they import Ray, which the routes and their document can do without
    from deployments.calls.embedder import EmbedderCalls, Inputs
    from deployments.calls.store import StoreCalls
    from deployments.calls.vectors import Vectors

TENANT = "default"
READY_TIMEOUT_S = 1.5  # a probe is answered within two seconds
_BODIES_IN_A_LINE = 16  # of an import, which holds all states of a memory

Rows = list[Fields]  # the class has a method `list`
Positions = list[int]


class Memserve:
    """Embedding, and the memories of users. Belongs to one event loop.

    A write that gets an `Origin.of_key` may be sent again: it is made once. The methods whose names end in `_body`
    take a body that was validated before.

    Args:
        embedder, vectors, store: the calls to the other deployments.
        model_name: as configured, for `check_ready` while no embedder runs.
        probe_embedder: False if there may be no embedder: a request starts one, a probe must not.
        max_body_bytes: the largest request body.
        max_import_line_bytes: the longest line of an import, which holds all states of a memory. By default it is 16
            times as long as a body.
    """

    def __init__(
        self,
        embedder: EmbedderCalls,
        vectors: Vectors,
        store: StoreCalls,
        *,
        model_name: str,
        probe_embedder: bool,
        max_body_bytes: int,
        max_import_line_bytes: int | None = None,
    ) -> None:
        self._embedder = embedder
        self._vectors = vectors
        self._store = store
        self._model_name = model_name
        self._probe_embedder = probe_embedder
        self._long_lines = LongLines(max_body_bytes)
        self.limit_bodies(max_body_bytes, max_import_line_bytes)

    def limit_bodies(self, max_body_bytes: int, max_import_line_bytes: int | None) -> None:
        """Change these arguments of the constructor."""
        self.max_body_bytes = self._long_lines.above_bytes = max_body_bytes
        self._max_import_line_bytes = max_import_line_bytes or _BODIES_IN_A_LINE * max_body_bytes

    # Embedding.

    async def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: Literal["query", "document"] | None = None,
        truncate: Truncate = "end",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Returns:
            (n, dim) float32, or (n, dimensions), in the order of `texts`.

        Raises:
            InvalidRequest: `texts` is not a list, a text is empty, there are too many texts, or an option is unknown.
            Overloaded: too much work is queued.
            DeadlineExceeded: a part of the request was still queued after `timeout_s`.
        """
        body = bodies.check(
            bodies.EmbeddingsBody,
            {
                "input": arguments.items(texts, "input"),
                "input_type": input_type,
                "truncate": truncate,
                "dimensions": dimensions,
            },
        )
        with deadlines.within(timeout_s):
            return outputs.cut((await self.embed_body(body)).vectors, body.dimensions)

    async def embed_body(self, body: bodies.EmbeddingsBody) -> outputs.EmbedResult:
        """Full vectors of the inputs, in order."""
        with located("input", in_list=not bodies.is_single(body.input)):
            return await self._vectors.of_inputs(
                bodies.as_list(body.input),
                input_type=body.input_type,
                truncate=body.truncate,
                dimensions=body.dimensions,
                turn=Turn(),
            )

    async def embed_prompted(
        self, inputs: Inputs, *, prompt_name: str | None, truncate: Truncate, dimensions: int | None = None
    ) -> outputs.EmbedResult:
        """Full vectors of the inputs, in order, with a prompt of the model. An error has the input's position."""
        return await self._vectors.of_prompted(
            inputs, prompt_name=prompt_name, truncate=truncate, dimensions=dimensions, turn=Turn()
        )

    async def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> Sequence[Sequence[TextToken]]:
        """The tokens of each text, with their places in it. An error has the text's position."""
        return await self._embedder.split(texts, add_special_tokens)

    async def decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> Sequence[str]:
        """The text of each list of token ids. An error has the list's position."""
        return await self._embedder.decode(ids, skip_special_tokens)

    async def model_info(self) -> ModelInfo:
        """The model that is served."""
        return await self._embedder.info()

    # Memories.

    async def add(
        self,
        user_id: str,
        memories: Sequence[str | Mapping[str, Any]],
        *,
        on_duplicate: Literal["add", "skip"] = "add",
        upsert: bool = False,
        origin: Origin | None = None,
        timeout_s: float | None = None,
    ) -> Rows:
        """Add memories (texts, or mappings with text, id, metadata, created_at, expires_at, vector) to one user.

        Returns:
            `{id, status, version}` of each, in order, once they are committed; with `truncated: True` if the text is
            longer than the model reads.

        Raises:
            InvalidRequest: `param` is the path of the field.
            store.Conflict: an id is in use for other content.
            Overloaded: too much work is queued.
            DeadlineExceeded: the write was still queued after `timeout_s`. Nothing of it was made.
        """
        items = [{"text": item} if isinstance(item, str) else item for item in arguments.items(memories, "memories")]
        body = bodies.check(bodies.AddBody, {"memories": items, "on_duplicate": on_duplicate, "upsert": upsert})
        with deadlines.within(timeout_s):
            added: Rows = (await self.add_body(arguments.new_user(user_id), body, origin or Origin.fresh()))["memories"]
        return added

    async def add_body(self, user_id: str, body: bodies.AddBody, origin: Origin) -> Fields:
        """Add memories to one user. `{memories: [{id, status, version, truncated?}], version}`."""
        in_list = body.memories is not None
        with located("memories" if in_list else "", in_list=in_list, beside=("user_id",)):
            (result,), truncated = await self._append([(user_id, body.items())], body, origin)
        added = [shapes.added(entry, truncated=cut) for entry, cut in zip(result.memories, truncated, strict=True)]
        return {"memories": added, "version": result.version}

    async def add_many(
        self,
        memories: Sequence[Mapping[str, Any]],
        *,
        origin: Origin | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Rows:
        """Add memories of many users (mappings as in `add`, each with its user_id), all of them or none.

        Returns:
            `{user_id, id, status, version, truncated?}` of each, in order, once they are committed.

        Raises:
            InvalidRequest, store.Conflict, Overloaded, DeadlineExceeded: as in `add`.
        """
        body = bodies.check(bodies.AddManyBody, {"memories": arguments.items(memories, "memories"), **options})
        with deadlines.within(timeout_s):
            return await self.add_many_body(body, origin or Origin.fresh())

    async def add_many_body(self, body: bodies.AddManyBody, origin: Origin) -> Rows:
        """Add memories of many users: they are written user by user, and answered in the order of the request."""
        of_user: defaultdict[str, Positions] = defaultdict(Positions)
        for position, item in enumerate(body.memories):
            of_user[item.user_id].append(position)
        groups = [(user_id, [body.memories[n] for n in positions]) for user_id, positions in of_user.items()]
        order = [position for positions in of_user.values() for position in positions]
        with located("memories"), renumbered(order):
            results, truncated = await self._append(groups, body, origin)
        entries = [entry for result in results for entry in result.memories]
        added_at = {
            position: shapes.added(entry, truncated=cut)
            for position, entry, cut in zip(order, entries, truncated, strict=True)
        }
        return [{"user_id": item.user_id, **added_at[n]} for n, item in enumerate(body.memories)]

    async def _append(
        self,
        groups: Sequence[tuple[str, Sequence[bodies.NewMemoryBody]]],
        options: bodies.AddBody | bodies.AddManyBody,
        origin: Origin,
    ) -> tuple[Sequence[AppendResult], Sequence[bool]]:
        """Embed the memories that have no vector, then commit all groups or none.

        Returns the results of the groups, and for each memory of all groups whether its text was cut. An error has
        the memory's position in all groups together.
        """
        items = [item for _, group in groups for item in group]
        turn = Turn.of_user(TENANT, groups[0][0]) if len(groups) == 1 else Turn()
        texts, given = [item.text for item in items], [item.vector for item in items]
        made, truncated = await self._vectors.of_memories(texts, given, turn)
        vectors = iter(made)
        numbers = itertools.count()
        # A write that only adds, under ids made for it, needs no record of its result: its rows in the log show that it
        # was made, and its time shows if its user was erased since. A client's key comes with another time.
        only_adds = not origin.has_key and options.on_duplicate == "add" and not any(item.id for item in items)
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
                        given_vector=item.vector is not None,
                        created_at=item.created_at,
                    )
                    for item, number in zip(group, numbers, strict=False)
                ),
                on_duplicate=options.on_duplicate,
                upsert=options.upsert,
                issued_at=origin.issued_at,
                write_id=None if only_adds else origin.write_id,
            )
            for user_id, group in groups
        ]
        return await self._store.append(appends), truncated

    async def search(
        self, user_id: str, query: str | None = None, *, timeout_s: float | None = None, **options: Any
    ) -> Rows:
        """Search one user's memories by text, or by `vector=`; the other options are those of SearchBody.

        Returns:
            memories with their score, best first.

        Raises:
            InvalidRequest: an option is wrong.
            Overloaded: too much work is queued.
            DeadlineExceeded: the search was still queued after `timeout_s`.
        """
        body = bodies.check(bodies.SearchBody, {"query": query, **options})
        with deadlines.within(timeout_s):
            found: Rows = (await self.search_body(arguments.user(user_id), body))["results"]
        return found

    async def search_body(self, user_id: str, body: bodies.SearchBody) -> Fields:
        """The best memories of one user. `{results, index, version}`; `truncated: True` if the query was cut."""
        vector, truncated = None, False
        if body.vector is not None:
            vector = await self._vectors.checked(body.vector)
        elif body.mode != "words":
            assert body.query is not None
            with located("query", in_list=False):
                embedded = await self._vectors.of_query(body.query, Turn.of_user(TENANT, user_id))
            vector, truncated = embedded.vectors[0], bool(embedded.truncated[0])
        found = await self._store.search(
            Search(
                tenant=TENANT,
                user_id=user_id,
                vector=vector,
                top_k=body.top_k,
                filter=body.filter,
                min_score=body.min_score,
                include_vectors=body.include_vectors,
                query=body.query,
                mode=body.ranked_by(),
                explain=body.explain,
            )
        )
        results = [shapes.memory(memory) for memory in found.results]
        answer: Fields = {"results": results, "index": found.index, "version": found.version}
        return {**answer, "truncated": True} if truncated else answer

    async def get(self, user_id: str, memory_id: str, **options: Any) -> Fields:
        """One memory, with its vector if `include_vectors`. Raises store.NotFound."""
        ids, query = arguments.memory(user_id, memory_id), bodies.check(bodies.GetQuery, options)
        return shapes.memory(await self._store.read_user(Store.get, TENANT, *ids, include_vector=query.include_vectors))

    async def get_many(self, user_id: str, ids: Sequence[str], **options: Any) -> Fields:
        """`{memories, missing}`: memories by their ids, and the ids of no memory; the options are of GetManyBody."""
        body = bodies.check(bodies.GetManyBody, {"ids": arguments.items(ids, "ids"), **options})
        return await self.get_many_body(arguments.user(user_id), body)

    async def get_many_body(self, user_id: str, body: bodies.GetManyBody) -> Fields:
        """`{memories, missing}`: memories of one user by their ids, and the ids of no memory."""
        found, missing = await self._store.read_user(
            Store.get_many, TENANT, user_id, body.ids, include_vectors=body.include_vectors
        )
        return {"memories": [shapes.memory(memory) for memory in found], "missing": missing}

    async def list(self, user_id: str, **options: Any) -> Fields:
        """`{memories, next_cursor}`: a page of one user's memories; the options are those of ListQuery."""
        query = bodies.check(bodies.ListQuery, options)
        page = await self._store.read_user(Store.list, TENANT, arguments.user(user_id), **query.model_dump())
        return {"memories": [shapes.memory(memory) for memory in page.memories], "next_cursor": page.next_cursor}

    async def update(self, user_id: str, memory_id: str, *, origin: Origin | None = None, **changes: Any) -> Fields:
        """Change the text, vector, metadata or expires_at of a memory, those that are given.

        A new text without a vector is embedded. If the text is the same as before, the memory keeps its vector.
        `metadata_merge` sets some keys of the metadata, and removes those that are None in it. With `if_version` the
        memory is changed only if it has that version. The answer is the memory, with `truncated: True` if the text is
        longer than the model reads.

        Raises:
            store.NotFound: there is no such memory.
            store.Conflict: the memory has another version than `if_version`.
        """
        origin = origin or Origin.fresh()
        ids = arguments.memory(user_id, memory_id)
        given = bodies.check(bodies.UpdateBody, changes).changes()
        while True:
            stored, truncated = await self._stored_changes(ids, given)
            try:
                changed = await self._store.write(
                    Store.update, TENANT, *ids, issued_at=origin.issued_at, write_id=origin.write_id, **stored
                )
            except Conflict as error:
                # If the caller gave no version, `_stored_changes` did, and another write came in between.
                if error.code != "version_mismatch" or "if_version" in given:
                    raise
            else:
                return shapes.memory(changed, truncated=truncated)

    async def _stored_changes(self, ids: tuple[str, str], given: Fields) -> tuple[Fields, bool]:
        """The arguments of `Store.update`, and whether the text was cut.

        A new text comes with its vector, an unchanged text as the version that has it.
        """
        if "vector" in given:
            return {**given, "vector": await self._vectors.checked(given["vector"])}, False
        if "text" not in given:
            return given, False
        turn = Turn.of_user(TENANT, ids[0])
        try:
            found = await self._store.read_user(Store.get, TENANT, *ids)
        except NotFound:  # the write may be a resent one, of a memory that was deleted since: the log decides
            found = None
        if found is not None and given["text"] == found.text:
            changes = {"if_version": found.version, **{name: given[name] for name in given if name != "text"}}
            with located("text", in_list=False):
                return changes, await self._vectors.is_cut(found.text, turn)
        with located("text", in_list=False):
            embedded = await self._vectors.of_texts([given["text"]], turn)
        return {**given, "vector": embedded.vectors[0]}, bool(embedded.truncated[0])

    async def delete(self, user_id: str, memory_id: str, *, origin: Origin | None = None) -> None:
        """Delete one memory of one user. Raises store.NotFound."""
        write_id = (origin or Origin.fresh()).write_id
        await self._store.write(Store.delete, TENANT, *arguments.memory(user_id, memory_id), write_id=write_id)

    async def delete_where(self, user_id: str, filter: Mapping[str, Any], *, origin: Origin | None = None) -> int:
        """Delete the memories of one user that match a filter. Returns how many."""
        body = bodies.check(bodies.DeleteBody, {"filter": filter})
        assert body.filter is not None
        write_id = (origin or Origin.fresh()).write_id
        return await self._store.write(
            Store.delete_where, TENANT, arguments.user(user_id), body.filter, write_id=write_id
        )

    async def delete_many(self, user_id: str, ids: Sequence[str], *, origin: Origin | None = None) -> Fields:
        """Delete memories of one user by their ids. `{deleted, missing}`: how many, and the ids of no memory."""
        body = bodies.check(bodies.DeleteBody, {"ids": arguments.items(ids, "ids")})
        assert body.ids is not None
        write_id = (origin or Origin.fresh()).write_id
        deleted, missing = await self._store.write(
            Store.delete_many, TENANT, arguments.user(user_id), body.ids, write_id=write_id
        )
        return {"deleted": deleted, "missing": missing}

    async def history(self, user_id: str, memory_id: str, **options: Any) -> Fields:
        """`{events, next_cursor}`: a page of the states of one memory, oldest first; the options are of HistoryQuery.

        Each is `{event, at, version, text, metadata}`. Raises store.NotFound.
        """
        ids, query = arguments.memory(user_id, memory_id), bodies.check(bodies.HistoryQuery, options)
        page = await self._store.read_user(Store.history_page, TENANT, *ids, **query.model_dump())
        return {"events": [shapes.event(event) for event in page.events], "next_cursor": page.next_cursor}

    # Users.

    async def user(self, user_id: str) -> Fields:
        """`{user_id, memories, version, bytes, index, resident}`; zeros if the user has never had a memory."""
        stats = await self._store.read_user(Store.user, TENANT, arguments.user(user_id))
        return {**shapes.user(stats), "index": stats.index, "resident": stats.resident}

    async def users(self, **options: Any) -> Fields:
        """`{users, next_cursor}`: a page of the users that have memories; the options are those of UsersQuery."""
        query = bodies.check(bodies.UsersQuery, options)
        page = await self._store.read(Store.users, TENANT, **query.model_dump())
        return {"users": [shapes.user(stats) for stats in page.users], "next_cursor": page.next_cursor}

    async def delete_user(self, user_id: str, *, origin: Origin | None = None) -> Fields:
        """Delete everything of one user. `{deleted, version}`."""
        write_id = (origin or Origin.fresh()).write_id
        deleted, version = await self._store.write(Store.erase_user, TENANT, arguments.user(user_id), write_id=write_id)
        return {"deleted": deleted, "version": version}

    async def export(self, user_id: str) -> AsyncIterator[bytes]:
        """NDJSON of one user's memories, several lines at a time. Over a handle, use `options(stream=True)`.

        Raises:
            DeadlineExceeded: the next lines were still queued when the deadline passed that the request had when the
                first lines were asked for.
        """
        user = arguments.user(user_id)
        deadline = deadline_of_request.get()  # the later pages are asked for after the request's context has ended

        async def page_after(cursor: ExportCursor | None) -> ExportPage:
            with deadlines.until(deadline):
                return await self._store.export_page(TENANT, user, cursor)

        async for piece in export_pieces(page_after):
            yield piece

    async def import_lines(
        self, user_id: str, lines: Sequence[str | bytes | Mapping[str, Any]], *, origin: Origin | None = None
    ) -> Fields:
        """Import lines of NDJSON, or mappings in their place. `{imported, unchanged}`; see calls/transfer.py."""
        items = arguments.items(lines, "lines")

        async def chunks() -> AsyncIterator[bytes]:
            for number, line in enumerate(items):
                yield to_line(line, number)

        return await self.import_stream(arguments.new_user(user_id), chunks(), origin or Origin.fresh())

    async def import_stream(self, user_id: str, chunks: AsyncIterable[bytes], origin: Origin) -> Fields:
        """Import NDJSON as it arrives, in chunks that may end anywhere.

        `{imported, unchanged}`, and `truncated`, the number of texts that were cut, if any was.
        """
        epoch: int | None = None  # of the user; None until a page is written
        truncated = 0
        turn = Turn.of_user(TENANT, user_id, bulk=True)

        async def embed(texts: Sequence[str]) -> np.ndarray:
            nonlocal truncated
            embedded = await self._vectors.of_texts(list(texts), turn if epoch is None else turn.after_begin())
            truncated += int(embedded.truncated.sum())
            return embedded.vectors

        async def write(lines: Sequence[ImportLine]) -> Imported:
            nonlocal epoch
            done = await self._store.import_page(TENANT, user_id, lines, issued_at=origin.issued_at, epoch=epoch)
            epoch = done.epoch
            return done

        with located("lines"):
            done = await import_pieces(
                chunks,
                max_line_bytes=self._max_import_line_bytes,
                long_lines=self._long_lines,
                embed=embed,
                write=write,
            )
        answer: Fields = {"imported": done.imported, "unchanged": done.unchanged}
        return {**answer, "truncated": truncated} if truncated else answer

    # Operations.

    async def check_ready(self) -> Fields:
        """Ask an embedder and a store whether they answer. `{model, device, dtype}`.

        Raises:
            Unavailable: the message names each that does not.
        """
        checks: dict[str, Callable[[], Awaitable[None]]] = {"store": self._store.ping}
        if self._probe_embedder:
            checks["embedder"] = self._embedder.ping

        async def reason(name: str, check: Callable[[], Awaitable[None]]) -> str | None:
            try:
                await asyncio.wait_for(check(), READY_TIMEOUT_S)
            except TimeoutError:
                return f"{name}: no answer within {READY_TIMEOUT_S:g} s"
            except (MemserveError, StoreError) as error:
                return f"{name}: {error}"
            return None

        found = await asyncio.gather(*(reason(*check) for check in sorted(checks.items())))
        if reasons := [each for each in found if each]:
            raise Unavailable(f"Not ready. {'; '.join(reasons)}", None, "not_ready")
        info = self._embedder.known_info
        if info is None:
            return {"model": self._model_name, "device": "none yet", "dtype": "none yet"}
        return {"model": info.name, "device": info.device, "dtype": info.dtype}
