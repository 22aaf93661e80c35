"""memserve without HTTP and without Serve: the calls that HTTP routes and handles have in common.

Guarantees:
- Invalid input is refused here, before it shares a batch with the input of other callers.
- A write is acknowledged only after the log has committed it.
- HTTP routes and handle calls validate alike and raise the same errors. An error has the path of its field in the
  caller's request.
- Each call about users is made for a Principal, and reaches the users that the principal reaches. A handle call has the
  one of the tenant that it names: code in the cluster is trusted.

Nothing here is durable: a call that waits is lost with the process. HAProxy or the client may send it again.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments import results, shapes
from deployments.calls.readiness import SharedCheck
from deployments.calls.refusals import RefusedRequests
from deployments.calls.transfer import LongLines, export_pieces, import_pieces, to_line
from deployments.embedding import outputs
from deployments.embedding.model import ModelInfo, TextToken, Truncate
from deployments.errors import MemserveError, Unavailable, located, renumbered
from deployments.fair_queue import Turn, deadline_of_request
from deployments.requests import arguments, bodies, deadlines
from deployments.requests.origin import Origin
from deployments.requests.principal import Principal
from deployments.shapes import Fields
from store import (
    DEFAULT_TENANT,
    Append,
    AppendResult,
    Conflict,
    Credential,
    ExportCursor,
    ExportPage,
    Imported,
    ImportLine,
    Key,
    NewMemory,
    NotFound,
    Search,
    SearchResult,
    Store,
    StoreError,
)

if TYPE_CHECKING:  # they import Ray, which the routes and their document can do without
    from deployments.calls.embedder import EmbedderCalls, Inputs
    from deployments.calls.keys import KnownKeys
    from deployments.calls.reranking import Reranking
    from deployments.calls.store import StoreCalls
    from deployments.calls.vectors import Vectors

RERANK_CANDIDATES = 50
"""Memories that a search with `rerank` scores, or `top_k` if that is more."""
READY_TIMEOUT_S = 1.5  # a probe is answered within two seconds
_BODIES_IN_A_LINE = 16  # of an import, which holds all states of a memory

Rows = list[Fields]  # the class has a method `list`
Positions = list[int]
Ids = list[str]


class Memserve:
    """Embedding, and the memories of users. Belongs to one event loop.

    A write that gets an `Origin.of_key` may be sent again: it is made once. The methods whose names end in `_body` are
    for the routes: they take the principal of a request, and arguments that were validated before. The others are the
    handle API.

    Args:
        embedder, vectors, store, reranking: the calls to the other deployments.
        keys: the keys that are known here.
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
        keys: KnownKeys,
        reranking: Reranking,
        *,
        model_name: str,
        probe_embedder: bool,
        max_body_bytes: int,
        max_import_line_bytes: int | None = None,
    ) -> None:
        self._embedder = embedder
        self._vectors = vectors
        self._store = store
        self._keys = keys
        self._reranking = reranking
        self.refused = RefusedRequests(store.record_refusals)
        self._readiness = SharedCheck(self._missing)
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
        timeout_s: float | None = None,
        tenant: str = DEFAULT_TENANT,
        **options: Any,
    ) -> np.ndarray:
        """Embed texts. The options are those of EmbeddingsBody.

        Cached vectors are shared with other calls for the tenant.

        Returns:
            (n, dim) float32, or (n, dimensions), in the order of `texts`. With `output_dtype` as `outputs.quantise` has
            them.

        Raises:
            InvalidRequest: `texts` is not a list, a text is empty, there are too many texts, or an option is unknown.
            Overloaded: too much work is queued.
            DeadlineExceeded: a part of the request was still queued after `timeout_s`.
        """
        body = bodies.check(bodies.EmbeddingsBody, {**options, "input": arguments.items(texts, "input")})
        who = arguments.principal(tenant)
        with deadlines.within(timeout_s):
            vectors = (await self.embed_body(who, body)).vectors
        return outputs.quantise(outputs.cut(vectors, body.dimensions), body.output_dtype)

    async def embed_body(self, who: Principal, body: bodies.EmbeddingsBody) -> outputs.EmbedResult:
        """Full vectors of the inputs, in order."""
        with located("input", in_list=not bodies.is_single(body.input)):
            return await self._vectors.of_inputs(
                bodies.as_list(body.input),
                input_type=body.input_type,
                truncate=body.truncate,
                dimensions=body.dimensions,
                realm=who.realm,
                turn=Turn(),
            )

    async def embed_prompted(
        self,
        who: Principal,
        inputs: Inputs,
        *,
        prompt_name: str | None,
        truncate: Truncate,
        dimensions: int | None = None,
    ) -> outputs.EmbedResult:
        """Full vectors of the inputs, in order, with a prompt of the model. An error has the input's position."""
        return await self._vectors.of_prompted(
            inputs, prompt_name=prompt_name, truncate=truncate, dimensions=dimensions, realm=who.realm, turn=Turn()
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

    # Reranking.

    async def rerank(
        self,
        query: str,
        documents: Sequence[str | Mapping[str, Any]],
        *,
        tenant: str = DEFAULT_TENANT,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Rows:
        """Score documents (texts, or mappings with a text) for a query; the options are those of RerankBody.

        Returns:
            `{index, relevance_score, document?}` of each, best first; `index` is its place in `documents`.

        Raises:
            InvalidRequest: there is no reranker, or `param` is the path of a wrong field.
            Overloaded: too much work is queued.
            DeadlineExceeded: a part of the request was still queued after `timeout_s`.
        """
        given = {"query": query, "documents": arguments.items(documents, "documents"), **options}
        body = bodies.check(bodies.RerankBody, given)
        arguments.principal(tenant)  # only checks the name: what is scored belongs to nobody
        with deadlines.within(timeout_s):
            return (await self.rerank_body(body))[0]

    async def rerank_body(self, body: bodies.RerankBody) -> tuple[Rows, outputs.Scores]:
        """`{index, relevance_score, document?}` of the best documents, best first, and the scores of all."""
        with located("documents"):
            found = await self.score(body.query, body.documents)
        rows: Rows = [{"index": n, "relevance_score": float(found.scores[n])} for n in found.order()[: body.top_n]]
        if body.return_documents:
            for row in rows:
                row["document"] = {"text": body.documents[row["index"]]}
        return rows, found

    async def score(self, query: str, texts: Sequence[str], *, truncate: Truncate = "end") -> outputs.Scores:
        """The scores of texts for a query, in their order. An error has the text's position."""
        return await self._reranking.scores(query, texts, truncate=truncate, turn=Turn())

    async def reranker_info(self) -> ModelInfo:
        """The model that reranks. Raises InvalidRequest if there is none."""
        return await self._reranking.info()

    # Memories.

    async def add(
        self,
        user_id: str,
        memories: Sequence[str | Mapping[str, Any]],
        *,
        origin: Origin | None = None,
        timeout_s: float | None = None,
        tenant: str = DEFAULT_TENANT,
        **options: Any,
    ) -> Rows:
        """Add memories to one user: texts, or mappings with the fields of NewMemoryBody.

        The options are `on_duplicate` and `upsert` of AddBody.

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
        body = bodies.check(bodies.AddBody, {**options, "memories": items})
        who, user = arguments.principal(tenant), arguments.new_user(user_id)
        with deadlines.within(timeout_s):
            added: Rows = (await self.add_body(who, user, body, origin or Origin.fresh()))["memories"]
        return added

    async def add_body(self, who: Principal, user_id: str, body: bodies.AddBody, origin: Origin) -> Fields:
        """Add memories to one user. `{memories: [{id, status, version, truncated?}], version}`."""
        tenant, user = who.user(user_id)
        in_list = body.memories is not None
        with located("memories" if in_list else "", in_list=in_list, beside=("user_id",)):
            (result,), truncated = await self._append(who, tenant, [(user, body.items())], body, origin)
        added = [shapes.added(entry, truncated=cut) for entry, cut in zip(result.memories, truncated, strict=True)]
        return {"memories": added, "version": result.version}

    async def add_many(
        self,
        memories: Sequence[Mapping[str, Any]],
        *,
        origin: Origin | None = None,
        timeout_s: float | None = None,
        tenant: str = DEFAULT_TENANT,
        **options: Any,
    ) -> Rows:
        """Add memories of many users (mappings as in `add`, each with its user_id), all of them or none.

        Returns:
            `{user_id, id, status, version, truncated?}` of each, in order, once they are committed.

        Raises:
            InvalidRequest, store.Conflict, Overloaded, DeadlineExceeded: as in `add`.
        """
        body = bodies.check(bodies.AddManyBody, {"memories": arguments.items(memories, "memories"), **options})
        who = arguments.principal(tenant)
        with deadlines.within(timeout_s):
            return await self.add_many_body(who, body, origin or Origin.fresh())

    async def add_many_body(self, who: Principal, body: bodies.AddManyBody, origin: Origin) -> Rows:
        """Add memories of many users: they are written user by user, and answered in the order of the request."""
        tenant = who.whole_tenant
        of_user: defaultdict[str, Positions] = defaultdict(Positions)
        for position, item in enumerate(body.memories):
            of_user[item.user_id].append(position)
        groups = [(user_id, [body.memories[n] for n in positions]) for user_id, positions in of_user.items()]
        order = [position for positions in of_user.values() for position in positions]
        with located("memories"), renumbered(order):
            results, truncated = await self._append(who, tenant, groups, body, origin)
        entries = [entry for result in results for entry in result.memories]
        added_at = {
            position: shapes.added(entry, truncated=cut)
            for position, entry, cut in zip(order, entries, truncated, strict=True)
        }
        return [{"user_id": item.user_id, **added_at[n]} for n, item in enumerate(body.memories)]

    async def _append(
        self,
        who: Principal,
        tenant: str,
        groups: Sequence[tuple[str, Sequence[bodies.NewMemoryBody]]],
        options: bodies.AddBody | bodies.AddManyBody,
        origin: Origin,
    ) -> tuple[Sequence[AppendResult], Sequence[bool]]:
        """Embed the memories that have no vector, then commit all groups or none.

        Returns the results of the groups, and for each memory of all groups whether its text was cut. An error has
        the memory's position in all groups together.
        """
        items = [item for _, group in groups for item in group]
        turn = Turn.of_user(tenant, groups[0][0]) if len(groups) == 1 else Turn()
        texts, given = [item.text for item in items], [item.vector for item in items]
        made, truncated = await self._vectors.of_memories(texts, given, turn)
        vectors = iter(made)
        numbers = itertools.count()
        # A write that only adds, under ids made for it, needs no record of its result: its rows in the log show that it
        # was made, and its time shows if its user was erased since. A client's key comes with another time.
        only_adds = not origin.has_key and options.on_duplicate == "add" and not any(item.id for item in items)
        appends = [
            Append(
                tenant=tenant,
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
                        happened_at=item.happened_at,
                        thread=item.thread,
                    )
                    for item, number in zip(group, numbers, strict=False)
                ),
                on_duplicate=options.on_duplicate,
                upsert=options.upsert,
                issued_at=origin.issued_at,
                write_id=None if only_adds else origin.write_id,
                by=who.key_id,
                duplicate_score=options.duplicate_score,
            )
            for user_id, group in groups
        ]
        return await self._store.append(appends), truncated

    async def search(
        self,
        user_id: str,
        query: str | None = None,
        *,
        timeout_s: float | None = None,
        tenant: str = DEFAULT_TENANT,
        **options: Any,
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
        who, user = arguments.principal(tenant), arguments.user(user_id)
        with deadlines.within(timeout_s):
            found: Rows = (await self.search_body(who, user, body))["results"]
        return found

    async def search_body(self, who: Principal, user_id: str, body: bodies.SearchBody) -> Fields:
        """The best memories of one user. `{results, index, version}`; `truncated: True` if the query was cut."""
        tenant, user = who.user(user_id)
        if body.rerank:
            self._reranking.calls()  # refuses the search if there is no reranker
        vector, truncated = None, False
        if body.vector is not None:
            vector = await self._vectors.checked(body.vector)
        elif body.mode != "words":
            assert body.query is not None
            with located("query", in_list=False):
                embedded = await self._vectors.of_query(body.query, who.realm, Turn.of_user(tenant, user))
            vector, truncated = embedded.vectors[0], bool(embedded.truncated[0])
        found = await self._store.search(
            Search(
                tenant=tenant,
                user_id=user,
                vector=vector,
                top_k=max(body.top_k, RERANK_CANDIDATES) if body.rerank else body.top_k,
                filter=body.filter,
                min_score=body.min_score,
                include_vectors=body.include_vectors,
                query=None if body.ranked_by() == "vector" else body.query,
                mode=body.ranked_by(),
                explain=body.explain,
                since=body.since,
                until=body.until,
                recency_half_life_s=body.recency_half_life_s,
                context=body.context,
            )
        )
        if body.rerank and found.results:
            found = await self._reranked(body, found, Turn.of_user(tenant, user))
        answer: Fields = {"index": found.index, "version": found.version}
        taken = None
        if body.max_tokens is not None:
            taken, answer["tokens"] = await self._within(found, body.max_tokens)
        answer = {"results": results.laid_out(found, body.order, taken), **answer}
        return {**answer, "truncated": True} if truncated else answer

    async def _within(self, found: SearchResult, max_tokens: int) -> tuple[set[str], int]:
        """The ids of the memories whose texts fit so many tokens, and how many these take."""
        texts = {id: memory.text for id, memory in results.memories_of(found).items()}
        tokens = dict.fromkeys(texts, 0)
        counted = [id for id, text in texts.items() if text]  # logs of older programs may hold empty texts
        if counted:
            with located("max_tokens", in_list=False):
                counts = await self._embedder.count_tokens([texts[id] for id in counted])
            tokens |= zip(counted, counts, strict=True)
        taken = results.within(found, tokens, max_tokens)
        return taken, sum(tokens[id] for id in taken)

    async def _reranked(self, body: bodies.SearchBody, found: SearchResult, turn: Turn) -> SearchResult:
        """The best `top_k` of the results of a search by the reranker, with its scores."""
        assert body.query is not None
        texts = [memory.text or " " for memory in found.results]  # logs of older programs may hold empty texts
        with located("query", in_list=False):
            ranked = await self._reranking.scores(body.query, texts, turn=turn)
        order = ranked.order()[: body.top_k]
        best = []
        for place in order:
            memory, score = found.results[place], float(ranked.scores[place])
            scores = None if memory.scores is None else {**memory.scores, "rerank": score}
            best.append(replace(memory, score=score, scores=scores))
        context = None if found.context is None else tuple(found.context[place] for place in order)
        return replace(found, results=best, context=context)

    async def get(self, user_id: str, memory_id: str, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """One memory, with its vector if `include_vectors`. Raises store.NotFound."""
        who, ids = arguments.principal(tenant), arguments.memory(user_id, memory_id)
        return await self.get_body(who, *ids, bodies.check(bodies.GetQuery, options))

    async def get_body(self, who: Principal, user_id: str, memory_id: str, query: bodies.GetQuery) -> Fields:
        """One memory. Raises store.NotFound."""
        found = await self._store.read_user(
            Store.get, *who.user(user_id), memory_id, include_vector=query.include_vectors
        )
        return shapes.memory(found)

    async def get_many(
        self, user_id: str, ids: Sequence[str], *, tenant: str = DEFAULT_TENANT, **options: Any
    ) -> Fields:
        """`{memories, missing}`: memories by their ids, and the ids of no memory; the options are of GetManyBody."""
        body = bodies.check(bodies.GetManyBody, {"ids": arguments.items(ids, "ids"), **options})
        return await self.get_many_body(arguments.principal(tenant), arguments.user(user_id), body)

    async def get_many_body(self, who: Principal, user_id: str, body: bodies.GetManyBody) -> Fields:
        """`{memories, missing}`: memories of one user by their ids, and the ids of no memory."""
        found, missing = await self._store.read_user(
            Store.get_many, *who.user(user_id), body.ids, include_vectors=body.include_vectors
        )
        return {"memories": [shapes.memory(memory) for memory in found], "missing": missing}

    async def list(self, user_id: str, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{memories, next_cursor}`: a page of one user's memories; the options are those of ListQuery."""
        query = bodies.check(bodies.ListQuery, options)
        return await self.list_body(arguments.principal(tenant), arguments.user(user_id), query)

    async def list_body(self, who: Principal, user_id: str, query: bodies.ListQuery) -> Fields:
        """`{memories, next_cursor}`: a page of one user's memories."""
        page = await self._store.read_user(Store.list, *who.user(user_id), **query.model_dump())
        return {"memories": [shapes.memory(memory) for memory in page.memories], "next_cursor": page.next_cursor}

    async def update(
        self,
        user_id: str,
        memory_id: str,
        *,
        origin: Origin | None = None,
        tenant: str = DEFAULT_TENANT,
        **changes: Any,
    ) -> Fields:
        """Change the fields of a memory that are given; the changes are those of UpdateBody.

        A new text without a vector is embedded. If the text is the same as before, the memory keeps its vector.
        `metadata_merge` sets some keys of the metadata, and removes those that are None in it. With `if_version` the
        memory is changed only if it has that version. The answer is the memory, with `truncated: True` if the text is
        longer than the model reads.

        Raises:
            store.NotFound: there is no such memory.
            store.Conflict: the memory has another version than `if_version`.
        """
        who, ids = arguments.principal(tenant), arguments.memory(user_id, memory_id)
        return await self.update_body(who, *ids, bodies.check(bodies.UpdateBody, changes), origin or Origin.fresh())

    async def update_body(
        self, who: Principal, user_id: str, memory_id: str, body: bodies.UpdateBody, origin: Origin
    ) -> Fields:
        """Change a memory, as `update` does. The answer has no content if the principal may not read."""
        ids, given = (*who.user(user_id), memory_id), body.changes()
        while True:
            stored, truncated = await self._stored_changes(ids, given)
            try:
                changed = await self._store.write(
                    Store.update, *ids, issued_at=origin.issued_at, write_id=origin.write_id, by=who.key_id, **stored
                )
            except Conflict as error:
                # If the caller gave no version, `_stored_changes` did, and another write came in between.
                if error.code != "version_mismatch" or "if_version" in given:
                    raise
            else:
                shape = shapes.memory if who.may("read") else shapes.changed
                return shape(changed, truncated=truncated)

    async def _stored_changes(self, ids: tuple[str, str, str], given: Fields) -> tuple[Fields, bool]:
        """The arguments of `Store.update`, and whether the text was cut.

        A new text comes with its vector, an unchanged text as the version that has it.
        """
        if "vector" in given:
            return {**given, "vector": await self._vectors.checked(given["vector"])}, False
        if "text" not in given:
            return given, False
        tenant, user, memory = ids
        turn = Turn.of_user(tenant, user)
        try:
            found = await self._store.read_user(Store.get, tenant, user, memory)
        except NotFound:  # the write may be a resent one, of a memory that was deleted since: the log decides
            found = None
        if found is not None and given["text"] == found.text:
            changes = {"if_version": found.version, **{name: given[name] for name in given if name != "text"}}
            with located("text", in_list=False):
                return changes, await self._vectors.is_cut(found.text, turn)
        with located("text", in_list=False):
            embedded = await self._vectors.of_texts([given["text"]], turn)
        return {**given, "vector": embedded.vectors[0]}, bool(embedded.truncated[0])

    async def delete(
        self, user_id: str, memory_id: str, *, origin: Origin | None = None, tenant: str = DEFAULT_TENANT
    ) -> None:
        """Delete one memory of one user. Raises store.NotFound."""
        who, ids = arguments.principal(tenant), arguments.memory(user_id, memory_id)
        await self.delete_body(who, *ids, origin or Origin.fresh())

    async def delete_body(self, who: Principal, user_id: str, memory_id: str, origin: Origin) -> None:
        """Delete one memory of one user. Raises store.NotFound."""
        await self._store.write(Store.delete, *who.user(user_id), memory_id, write_id=origin.write_id, by=who.key_id)

    async def delete_where(
        self,
        user_id: str,
        filter: Mapping[str, Any],
        *,
        origin: Origin | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> int:
        """Delete the memories of one user that match a filter. Returns how many."""
        body = bodies.check(bodies.DeleteBody, {"filter": filter})
        assert body.filter is not None
        who, user = arguments.principal(tenant), arguments.user(user_id)
        return await self.delete_where_body(who, user, body.filter, origin or Origin.fresh())

    async def delete_where_body(self, who: Principal, user_id: str, filter: Fields, origin: Origin) -> int:
        """Delete the memories of one user that match a filter. Returns how many."""
        return await self._store.write(
            Store.delete_where, *who.user(user_id), filter, write_id=origin.write_id, by=who.key_id
        )

    async def delete_many(
        self, user_id: str, ids: Sequence[str], *, origin: Origin | None = None, tenant: str = DEFAULT_TENANT
    ) -> Fields:
        """Delete memories of one user by their ids. `{deleted, missing}`: how many, and the ids of no memory."""
        body = bodies.check(bodies.DeleteBody, {"ids": arguments.items(ids, "ids")})
        assert body.ids is not None
        who, user = arguments.principal(tenant), arguments.user(user_id)
        return await self.delete_many_body(who, user, body.ids, origin or Origin.fresh())

    async def delete_many_body(self, who: Principal, user_id: str, ids: Ids, origin: Origin) -> Fields:
        """Delete memories of one user by their ids. `{deleted, missing}`."""
        deleted, missing = await self._store.write(
            Store.delete_many, *who.user(user_id), ids, write_id=origin.write_id, by=who.key_id
        )
        return {"deleted": deleted, "missing": missing}

    async def history(self, user_id: str, memory_id: str, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{events, next_cursor}`: a page of the states of one memory, oldest first; the options are of HistoryQuery.

        Each is `{event, at, version, text, metadata}`. Raises store.NotFound.
        """
        who, ids = arguments.principal(tenant), arguments.memory(user_id, memory_id)
        return await self.history_body(who, *ids, bodies.check(bodies.HistoryQuery, options))

    async def history_body(self, who: Principal, user_id: str, memory_id: str, query: bodies.HistoryQuery) -> Fields:
        """`{events, next_cursor}`: a page of the states of one memory. Raises store.NotFound."""
        page = await self._store.read_user(Store.history_page, *who.user(user_id), memory_id, **query.model_dump())
        return {"events": [shapes.event(event) for event in page.events], "next_cursor": page.next_cursor}

    async def duplicates(self, user_id: str, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{groups: [{memories}], next_cursor}`: a page of near duplicates; the options are those of DuplicatesBody."""
        body = bodies.check(bodies.DuplicatesBody, options)
        return await self.duplicates_body(arguments.principal(tenant), arguments.user(user_id), body)

    async def duplicates_body(self, who: Principal, user_id: str, body: bodies.DuplicatesBody) -> Fields:
        """`{groups: [{memories}], next_cursor}`: a page of groups of near duplicates."""
        page = await self._store.read_user(Store.duplicates, *who.user(user_id), **body.model_dump())
        groups = [{"memories": [shapes.memory(memory) for memory in group]} for group in page.groups]
        return {"groups": groups, "next_cursor": page.next_cursor}

    # Users.

    async def user(self, user_id: str, *, tenant: str = DEFAULT_TENANT) -> Fields:
        """`{user_id, memories, version, bytes, index, resident}`; zeros if the user has never had a memory."""
        return await self.user_body(arguments.principal(tenant), arguments.user(user_id))

    async def user_body(self, who: Principal, user_id: str) -> Fields:
        """`{user_id, memories, version, bytes, index, resident}`."""
        stats = await self._store.read_user(Store.user, *who.user(user_id))
        return {**shapes.user(stats), "index": stats.index, "resident": stats.resident}

    async def users(self, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{users, next_cursor}`: a page of the users that have memories; the options are those of UsersQuery."""
        return await self.users_body(arguments.principal(tenant), bodies.check(bodies.UsersQuery, options))

    async def users_body(self, who: Principal, query: bodies.UsersQuery) -> Fields:
        """`{users, next_cursor}`: a page of the users that have memories."""
        page = await self._store.read(Store.users, who.whole_tenant, **query.model_dump())
        return {"users": [shapes.user(stats) for stats in page.users], "next_cursor": page.next_cursor}

    async def delete_user(self, user_id: str, *, origin: Origin | None = None, tenant: str = DEFAULT_TENANT) -> Fields:
        """Delete everything of one user. `{deleted, version}`."""
        who, user = arguments.principal(tenant), arguments.user(user_id)
        return await self.delete_user_body(who, user, origin or Origin.fresh())

    async def delete_user_body(self, who: Principal, user_id: str, origin: Origin) -> Fields:
        """Delete everything of one user. `{deleted, version}`."""
        deleted, version = await self._store.write(
            Store.erase_user, *who.user(user_id), write_id=origin.write_id, by=who.key_id
        )
        return {"deleted": deleted, "version": version}

    async def export(self, user_id: str, *, tenant: str = DEFAULT_TENANT) -> AsyncIterator[bytes]:
        """NDJSON of one user's memories, several lines at a time. Over a handle, use `options(stream=True)`."""
        async for piece in self.export_body(arguments.principal(tenant), arguments.user(user_id)):
            yield piece

    async def export_body(self, who: Principal, user_id: str) -> AsyncIterator[bytes]:
        """NDJSON of one user's memories, several lines at a time.

        Raises:
            DeadlineExceeded: the next lines were still queued when the deadline passed that the request had when the
                first lines were asked for.
            Unauthorized: the key was revoked or has expired meanwhile.
        """
        tenant, user = who.user(user_id)
        deadline = deadline_of_request.get()  # the later pages are asked for after the request's context has ended

        async def page_after(cursor: ExportCursor | None) -> ExportPage:
            await who.check()
            with deadlines.until(deadline):
                return await self._store.export_page(tenant, user, cursor)

        async for piece in export_pieces(page_after):
            yield piece

    async def import_lines(
        self,
        user_id: str,
        lines: Sequence[str | bytes | Mapping[str, Any]],
        *,
        origin: Origin | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Fields:
        """Import lines of NDJSON, or mappings in their place. `{imported, unchanged}`; see calls/transfer.py."""
        items = arguments.items(lines, "lines")

        async def chunks() -> AsyncIterator[bytes]:
            for number, line in enumerate(items):
                yield to_line(line, number)

        who, user = arguments.principal(tenant), arguments.new_user(user_id)
        return await self.import_body(who, user, chunks(), origin or Origin.fresh())

    async def import_body(self, who: Principal, user_id: str, chunks: AsyncIterable[bytes], origin: Origin) -> Fields:
        """Import NDJSON as it arrives, in chunks that may end anywhere.

        `{imported, unchanged}`, and `truncated`, the number of texts that were cut, if any was.

        Raises:
            Unauthorized: the key was revoked or has expired meanwhile. The lines before `param` are written.
        """
        tenant, user = who.user(user_id)
        epoch: int | None = None  # of the user; None until a page is written
        truncated = 0
        turn = Turn.of_user(tenant, user, bulk=True)

        async def embed(texts: Sequence[str]) -> np.ndarray:
            nonlocal truncated
            embedded = await self._vectors.of_texts(list(texts), turn if epoch is None else turn.after_begin())
            truncated += int(embedded.truncated.sum())
            return embedded.vectors

        async def write(lines: Sequence[ImportLine]) -> Imported:
            nonlocal epoch
            done = await self._store.import_page(
                tenant, user, lines, issued_at=origin.issued_at, epoch=epoch, by=who.key_id
            )
            epoch = done.epoch
            return done

        with located("lines"):
            done = await import_pieces(
                chunks,
                max_line_bytes=self._max_import_line_bytes,
                long_lines=self._long_lines,
                check=who.check,
                embed=embed,
                write=write,
            )
        answer: Fields = {"imported": done.imported, "unchanged": done.unchanged}
        return {**answer, "truncated": truncated} if truncated else answer

    # Audit.

    async def events(self, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{events, next_cursor, has_more}`: a page of a tenant's audit; the options are those of EventsQuery."""
        return await self.events_body(arguments.principal(tenant), bodies.check(bodies.EventsQuery, options))

    async def events_body(self, who: Principal, query: bodies.EventsQuery) -> Fields:
        """A page of the audit, with what this gateway has refused so far."""
        tenant = who.whole_tenant
        await self.refused.flush(tenant)
        page = await self._store.read(Store.events, tenant, **query.model_dump())
        events = [shapes.audited(event) for event in page.events]
        return {"events": events, "next_cursor": page.next_cursor, "has_more": page.has_more}

    # Keys.

    async def find_key(self, credential: Credential) -> Key | None:
        """The key of a credential; None if it cannot be used. See deployments/calls/keys.py."""
        return await self._keys.find(credential)

    async def create_key(self, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """Make a key of a tenant; the options are those of CreateKeyBody. Its field `key` is the key itself."""
        return await self.create_key_body(arguments.principal(tenant), bodies.check(bodies.CreateKeyBody, options))

    async def create_key_body(self, who: Principal, body: bodies.CreateKeyBody) -> Fields:
        """Make a key of the principal's tenant."""
        made = await self._store.write_keys(Store.create_key, who.whole_tenant, by=who.key_id, **body.model_dump())
        return {**shapes.key(made.key), "key": made.secret}

    async def keys(self, *, tenant: str = DEFAULT_TENANT, **options: Any) -> Fields:
        """`{keys, next_cursor}`: a page of a tenant's keys, the newest first; the options are those of KeysQuery."""
        return await self.keys_body(arguments.principal(tenant), bodies.check(bodies.KeysQuery, options))

    async def keys_body(self, who: Principal, query: bodies.KeysQuery) -> Fields:
        """`{keys, next_cursor}`: a page of the keys of the principal's tenant."""
        page = await self._store.read(Store.keys, who.whole_tenant, **query.model_dump())
        return {"keys": [shapes.key(key) for key in page.keys], "next_cursor": page.next_cursor}

    async def revoke_key(self, key_id: str, *, tenant: str = DEFAULT_TENANT) -> Fields:
        """Revoke a key of a tenant. Every gateway refuses it within `calls.keys.FRESH_S`. Raises store.NotFound."""
        return await self.revoke_key_body(arguments.principal(tenant), arguments.key(key_id))

    async def revoke_key_body(self, who: Principal, key_id: str) -> Fields:
        """Revoke a key of the principal's tenant. Raises store.NotFound."""
        revoked = await self._store.write_keys(Store.revoke_key, who.whole_tenant, key_id, by=who.key_id)
        self._keys.forget(revoked.id)
        return shapes.key(revoked)

    # Operations.

    async def check_ready(self) -> Fields:
        """Find out whether an embedder and a store answer, or did within the last second. `{model, device, dtype}`.

        Raises:
            Unavailable: the message names each that does not.
        """
        if reasons := await self._readiness():
            raise Unavailable(f"Not ready. {'; '.join(reasons)}", None, "not_ready")
        info = self._embedder.known_info
        if info is None:
            return {"model": self._model_name, "device": "none yet", "dtype": "none yet"}
        return {"model": info.name, "device": info.device, "dtype": info.dtype}

    async def _missing(self) -> Sequence[str]:
        """Ask an embedder and a store whether they answer. Names each that does not."""
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
        return [each for each in found if each]
