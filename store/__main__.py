"""python -m store: export, import, stats, verify and reembed, on a log that may be served meanwhile; compact, on one
whose writers are stopped.

Exit status: 0 done; 1 `verify` found something; 2 it could not be done, with the reason on standard error.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
import orjson
from tqdm import tqdm

from store.errors import InvalidInput, LogUnavailable, StoreError
from store.log import maintenance, rows
from store.log.database import Log
from store.records import DEFAULT_TENANT
from store.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m store", description="Work on a memory log.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("--log", required=True, metavar="URL", help="sqlite:///PATH or postgresql://...")
        if name in ("export", "import"):
            command.add_argument("--tenant", default=DEFAULT_TENANT)
            command.add_argument("--user", required=True)
            command.add_argument("file", nargs="?", type=Path, help="default: standard input or output")
        if name == "reembed":
            command.add_argument("--model", required=True, help="the new model's name, as its server will be set to")
            command.add_argument("--url", required=True, help="a memserve that runs the new model: http://HOST:PORT")
            command.add_argument("--api-key", default=None)
            command.add_argument("--batch", type=int, default=64, help="texts a request")
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command][0](options)
    except (StoreError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"python -m store {options.command}: {error}", file=sys.stderr)
        return 2


def export(options: argparse.Namespace) -> int:
    """Write one user's memories as NDJSON."""
    store = _store(options.log)
    try:
        total = store.user(options.tenant, options.user).memories
        with _file(options.file, "wb") as file:
            for line in tqdm(store.export(options.tenant, options.user), total=total, unit="memories", disable=None):
                file.write(line)
    finally:
        store.close()
    return 0


def import_(options: argparse.Namespace) -> int:
    """Read one user's memories from NDJSON."""
    with _file(options.file, "rb") as file:
        lines = iter(file)
        first = next(lines, b"")
        store = _store(options.log, first)

        def counted() -> Iterator[bytes]:
            with tqdm(unit="memories", disable=None) as bar:
                for line in chain((first,), lines):
                    yield line
                    bar.update()

        try:
            done = store.import_lines(options.tenant, options.user, counted())
        finally:
            store.close()
    print(orjson.dumps({"imported": done.imported, "unchanged": done.unchanged}).decode())
    return 0


def stats(options: argparse.Namespace) -> int:
    """Print what there is in a log, as JSON."""
    log = Log.open(options.log, make=False)
    try:
        print(orjson.dumps(maintenance.count(log)._asdict(), option=orjson.OPT_INDENT_2).decode())
    finally:
        log.close()
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check what is served of every memory."""
    log = Log.open(options.log, quick_check_bytes=0, make=False)
    problems = 0
    try:
        with tqdm(unit="memories", disable=None) as bar:
            for problem in maintenance.verify(log, bar.update):
                tqdm.write(problem)
                problems += 1
    finally:
        log.close()
    print(f"{problems} problems" if problems else "sound")
    return 1 if problems else 0


def compact(options: argparse.Namespace) -> int:
    """Give the space of erased rows back. No other process may write meanwhile."""
    log = Log.open(options.log, make=False)
    try:
        gone = maintenance.compact(log, rows.micros(datetime.now(UTC), "now"))
    finally:
        log.close()
    print(f"{gone} tombstones removed")
    return 0


def reembed(options: argparse.Namespace) -> int:
    """Move a log to another model."""
    log = Log.open(options.log, make=False)
    try:
        total = maintenance.count(log).memories
        with (
            httpx.Client(base_url=options.url.rstrip("/"), timeout=120) as client,
            tqdm(total=total, unit="memories", disable=None) as bar,
        ):
            embed = _embedder(client, options.model, options.api_key)
            done = maintenance.reembed(log, options.model, embed, batch=options.batch, progress=bar.update)
    finally:
        log.close()
    print(f"{done} memories embedded; the log serves {options.model} now: restart its servers with that model")
    return 0


def _embedder(client: httpx.Client, model: str, api_key: str | None) -> Callable[[Sequence[str]], Any]:
    """Texts to vectors by POST /v1/embeddings, of a server that runs the model; waits where it says that it is busy."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def embed(texts: Sequence[str]) -> Any:
        body = {"model": model, "input": list(texts), "encoding_format": "base64", "input_type": "document"}
        for _ in range(20):
            answer = client.post("/v1/embeddings", json=body, headers=headers)
            if answer.status_code not in (429, 503):
                break
            asked = answer.headers.get("Retry-After", "")
            time.sleep(min(30.0, float(asked)) if asked.isdecimal() else 1.0)  # it may be a date, too
        if answer.status_code != 200:
            raise LogUnavailable(f"The embedding server answers {answer.status_code}: {answer.text[:300]}")
        try:
            data = sorted(answer.json()["data"], key=lambda item: item["index"])
            return np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
        except (ValueError, TypeError, KeyError) as error:
            raise LogUnavailable(f"The answer of {answer.url} holds no embeddings: {error}") from error

    return embed


def _store(url: str, line: bytes = b"") -> Store:
    """A store for the log's own model, or for that of the line where the log has none yet."""
    log = Log.open(url, make=bool(line))
    try:
        serving = maintenance.served(log)
    finally:
        log.close()
    if serving is None and line:
        try:
            first = orjson.loads(line)
            serving = maintenance.Served(first["model"], len(first["vector"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidInput("The first line names no model with its vector.", "lines.0") from error
    if serving is None:
        raise InvalidInput("The log was never served: it has no model.")
    return Store.open(url, dim=serving.dim, model=serving.model)


def _file(path: Path | None, mode: str) -> IO[bytes]:
    if path is not None:
        return path.open(mode)
    return open((sys.stdin if mode == "rb" else sys.stdout).fileno(), mode, closefd=False)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "export": (export, "write one user's memories as NDJSON"),
    "import": (import_, "read one user's memories from NDJSON"),
    "stats": (stats, "print what there is in a log, as JSON"),
    "verify": (verify, "check each memory as it is now: hashes, vector, counts; and a SQLite file's structure"),
    "compact": (compact, "give the space of erased rows back; stop the writers first"),
    "reembed": (reembed, "move a log to another model; its servers serve on meanwhile"),
}

if __name__ == "__main__":
    sys.exit(main())
