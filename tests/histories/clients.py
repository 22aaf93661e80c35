"""Clients of a store and of the routes, whose answers are recorded in a history (tests/histories)."""

import random
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import orjson

from deployments.calls.store import StoreCalls
from deployments.errors import MemserveError
from deployments.requests.origin import Origin
from store import Append as StoreAppend
from store import NewMemory, Store, StoreError
from store import Search as StoreSearch
from tests import workload
from tests.histories.records import (
    Answer,
    Append,
    Appended,
    Delete,
    DeleteWhere,
    Erase,
    Found,
    Get,
    List,
    One,
    Operation,
    Refused,
    Removed,
    Search,
    Update,
    Vector,
    Where,
)

TENANT = "default"


class RandomlyRouted(StoreCalls):
    """Calls that go to a random replica."""

    def _partition(self, tenant: str, user_id: str) -> int:
        return random.randrange(len(self._by_partition))


class OverHandle:
    """A client of the Store deployment, as a gateway is."""

    def __init__(self, handle: Any) -> None:
        self._calls = RandomlyRouted(handle, partitions=64, append_in_flight=2, append_memories=64, max_wait_s=30.0)

    async def perform(self, user: str, operation: Operation) -> Answer | None:
        """The answer, or None if the outcome of the operation is not known."""
        try:
            return await self._perform(user, operation)
        except StoreError as error:
            return workload.refused(error)
        except MemserveError:
            return None

    async def _perform(self, user: str, operation: Operation) -> Answer:
        calls, origin = self._calls, Origin.fresh()
        match operation:
            case Append(memories, upsert):
                rows = tuple(
                    NewMemory(
                        new.id or origin.memory_id(number),
                        new.text,
                        array(new.vector),
                        new.metadata,
                        generated_id=new.id is None,
                    )
                    for number, new in enumerate(memories)
                )
                request = StoreAppend(
                    TENANT, user, rows, upsert=upsert, issued_at=origin.issued_at, write_id=origin.write_id
                )
                return workload.appended((await calls.append([request]))[0])
            case Update(id, text, vector, metadata, if_version):
                changes: dict[str, Any] = {} if metadata is None else {"metadata": metadata}
                if text is not None and vector is not None:
                    changes |= {"text": text, "vector": array(vector)}
                changes |= {"if_version": if_version, "issued_at": origin.issued_at, "write_id": origin.write_id}
                return One(workload.seen(await calls.write(Store.update, TENANT, user, id, **changes)))
            case Delete(id):
                await calls.write(Store.delete, TENANT, user, id, write_id=origin.write_id)
                return Removed(1)
            case DeleteWhere((key, value)):
                where = {key: value}
                return Removed(await calls.write(Store.delete_where, TENANT, user, where, write_id=origin.write_id))
            case Erase():
                return Removed(*await calls.write(Store.erase_user, TENANT, user, write_id=origin.write_id))
            case Get(id):
                return One(workload.seen(await calls.read_user(Store.get, TENANT, user, id)))
            case List(where):
                page = await calls.read_user(
                    Store.list, TENANT, user, limit=workload.ALL, filter=as_filter(where), order="updated_at"
                )
                return Found(tuple(map(workload.seen, page.memories)))
            case Search(vector, top_k, where):
                search = StoreSearch(TENANT, user, array(vector), top_k, as_filter(where))
                return workload.found(await calls.search(search))


class OverHttp:
    """A client of the routes."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def perform(self, user: str, operation: Operation) -> Answer | None:
        """As `OverHandle.perform`."""
        method, path, body = _request(operation)
        url = f"/v1/users/{quote(user, safe='')}{path}"
        try:
            answer = await self._http.request(method, url, content=None if body is None else orjson.dumps(body))
        except httpx.TransportError:
            return None
        if answer.status_code in (404, 409):
            return Refused(answer.json()["error"]["code"] or "not_found")
        return _answer(operation, orjson.loads(answer.content or b"{}")) if answer.is_success else None


def _request(operation: Operation) -> tuple[str, str, dict[str, Any] | None]:
    match operation:
        case Append(memories, upsert):
            rows = [
                {"text": new.text, "vector": new.vector, "metadata": new.metadata, **({"id": new.id} if new.id else {})}
                for new in memories
            ]
            return "POST", "/memories", {"memories": rows, "upsert": upsert}
        case Update(id, text, _, metadata, if_version):
            changes = {"text": text, "metadata": metadata, "if_version": if_version}
            return "PATCH", f"/memories/{id}", {name: value for name, value in changes.items() if value is not None}
        case Delete(id):
            return "DELETE", f"/memories/{id}", None
        case DeleteWhere(where):
            return "DELETE", "/memories", {"filter": as_filter(where)}
        case Erase():
            return "DELETE", "", None
        case Get(id):
            return "GET", f"/memories/{id}", None
        case List(where):
            query = f"?limit={workload.ALL}&order=updated_at"
            return (
                "GET",
                f"/memories{query}{'' if where is None else f'&filter={quote(orjson.dumps(as_filter(where)))}'}",
                None,
            )
        case Search(vector, top_k, where):
            given = {} if where is None else {"filter": as_filter(where)}
            return "POST", "/memories/search", {"vector": vector, "top_k": top_k, **given}


def _answer(operation: Operation, body: dict[str, Any]) -> Answer:
    match operation:
        case Append():
            entries = tuple((entry["id"], entry["status"], entry["version"]) for entry in body["memories"])
            return Appended(entries, body["version"])
        case Update() | Get():
            return One(workload.seen_over_http(body))
        case Delete():
            return Removed(1)
        case DeleteWhere() | Erase():
            return Removed(body["deleted"], body.get("version"))
        case List():
            return Found(tuple(map(workload.seen_over_http, body["memories"])))
        case Search():
            return Found(tuple(map(workload.seen_over_http, body["results"])), body["version"], body["index"])


def array(vector: Vector) -> Any:
    return np.array(vector, np.float32)


def as_filter(where: Where | None) -> dict[str, Any] | None:
    return None if where is None else dict([where])
