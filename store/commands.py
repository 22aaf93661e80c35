"""The work of `memserve log`: each function does one command, and prints its result on standard output.

A server may use the log meanwhile, except for `compact`. All functions raise StoreError if the log cannot be used, and
OSError if a file cannot be.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import IO, Any

import httpx
import numpy as np
import orjson
from tqdm import tqdm

from store.errors import InvalidInput, LogUnavailable
from store.log import maintenance, rows
from store.log.database import Log
from store.store import Store

BUSY_TRIES = 20
LONGEST_PAUSE_S = 30.0


def export(url: str, tenant: str, user: str, open_file: Callable[[], IO[bytes]]) -> None:
    """Write one user's memories as NDJSON, to a file that is opened once the log has been."""
    store = _open_store(url)
    try:
        total = store.user(tenant, user).memories
        with open_file() as file:
            for line in tqdm(store.export(tenant, user), total=total, unit="memories", disable=None):
                file.write(line)
    finally:
        store.close()


def import_(url: str, tenant: str, user: str, open_file: Callable[[], IO[bytes]]) -> None:
    """Add one user's memories from NDJSON. Lines are read as they are written, so the file may be of any size."""
    with open_file() as file:
        lines = iter(file)
        first = next(lines, b"")
        store = _open_store(url, first)

        def counted() -> Iterator[bytes]:
            with tqdm(unit="memories", disable=None) as bar:
                for line in chain((first,), lines):
                    yield line
                    bar.update()

        try:
            done = store.import_lines(tenant, user, counted())
        finally:
            store.close()
    print(orjson.dumps({"imported": done.imported, "unchanged": done.unchanged}).decode())


def stats(url: str) -> None:
    """Print the counts of a log as JSON."""
    log = Log.open(url, make=False)
    try:
        print(orjson.dumps(maintenance.count(log)._asdict(), option=orjson.OPT_INDENT_2).decode())
    finally:
        log.close()


def verify(url: str) -> int:
    """Check every memory. Prints each problem; returns their number."""
    log = Log.open(url, quick_check_bytes=0, make=False)
    problems = 0
    try:
        with tqdm(unit="memories", disable=None) as bar:
            for problem in maintenance.verify(log, bar.update):
                tqdm.write(problem)
                problems += 1
    finally:
        log.close()
    print(f"{problems} problems" if problems else "sound")
    return problems


def compact(url: str) -> None:
    """Give the space of erased rows back. No other process may write meanwhile."""
    log = Log.open(url, make=False)
    try:
        removed = maintenance.compact(log, rows.micros(datetime.now(UTC), "now"))
    finally:
        log.close()
    print(f"{removed} tombstones removed")


def reembed(url: str, model: str, server: str, *, api_key: str | None = None, batch: int = 64) -> None:
    """Move a log to another model.

    Args:
        server: URL of a memserve that runs the new model.
        batch: texts per request.

    Raises:
        httpx.HTTPError, httpx.InvalidURL: the server cannot be reached.
        LogUnavailable: the server refuses, or answers without embeddings.
    """
    log = Log.open(url, make=False)
    try:
        total = maintenance.count(log).memories
        with (
            httpx.Client(base_url=server.rstrip("/"), timeout=120) as client,
            tqdm(total=total, unit="memories", disable=None) as bar,
        ):
            done = maintenance.reembed(log, model, _embed_at(client, model, api_key), batch=batch, progress=bar.update)
    finally:
        log.close()
    print(f"{done} memories embedded; the log serves {model} now: restart its servers with that model")


def _embed_at(client: httpx.Client, model: str, api_key: str | None) -> Callable[[Sequence[str]], Any]:
    """A function from n texts to (n, dim) float32 vectors, which asks a server by POST /v1/embeddings.

    If the server is busy, it waits as long as the server asks, at most 30 s, and asks again, 20 times in all.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def embed(texts: Sequence[str]) -> Any:
        body = {"model": model, "input": list(texts), "encoding_format": "base64", "input_type": "document"}
        for _ in range(BUSY_TRIES):
            answer = client.post("/v1/embeddings", json=body, headers=headers)
            if answer.status_code not in (429, 503):
                break
            asked = answer.headers.get("Retry-After", "")  # seconds or a date
            time.sleep(min(LONGEST_PAUSE_S, float(asked)) if asked.isdecimal() else 1.0)
        if answer.status_code != 200:
            raise LogUnavailable(f"The embedding server answers {answer.status_code}: {answer.text[:300]}")
        try:
            data = sorted(answer.json()["data"], key=lambda item: item["index"])
            return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
        except (ValueError, TypeError, KeyError) as error:
            raise LogUnavailable(f"The answer of {answer.url} holds no embeddings: {error}") from error

    return embed


def _open_store(url: str, first_line: bytes = b"") -> Store:
    """A store for the log's own model; for the model of the first line if the log has none yet."""
    log = Log.open(url, make=bool(first_line))
    try:
        serving = maintenance.served(log)
    finally:
        log.close()
    if serving is None and first_line:
        try:
            first = orjson.loads(first_line)
            serving = maintenance.Served(first["model"], len(first["vector"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput("The first line names no model with its vector.") from error
    if serving is None:
        raise InvalidInput("The log was never served: it has no model.")
    return Store.open(url, dim=serving.dim, model=serving.model)
