"""Reading, changing, moving and forgetting memories on a live Serve: two store replicas behind HAProxy.

tests/api tests the routes in one process. The tests here need several replicas, HAProxy or files on disk.
"""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.cluster.server import Server

DIM = 384


@pytest.fixture
def user() -> str:
    return f"user-{uuid.uuid4()}"


def fill(http: httpx.Client, user: str, count: int, **metadata: Any) -> None:
    rng = np.random.default_rng(count)
    for start in range(0, count, 500):
        memories = [
            {
                "id": str(n),
                "text": f"note {n}",
                "metadata": {"n": n, **metadata},
                "vector": rng.normal(size=DIM).round(4).tolist(),
            }
            for n in range(start, min(count, start + 500))
        ]
        assert http.post(f"/v1/users/{user}/memories", json={"memories": memories}).status_code == 201


def test_every_replica_sees_every_change_at_once(http: httpx.Client, user: str) -> None:
    path = f"/v1/users/{user}/memories"
    fill(http, user, 20)
    for n in range(20):
        changed = http.patch(f"{path}/{n}", json={"text": f"changed {n}", "metadata": {"n": -n}}).json()
        assert http.get(f"{path}/{n}").json() == changed
        assert len(http.get(f"{path}/{n}/history").json()["events"]) == 2
        (best,) = http.post(f"{path}/search", json={"query": f"changed {n}", "top_k": 1}).json()["results"]
        assert best["id"] == str(n)
        assert http.get(f"/v1/users/{user}").json()["version"] == changed["version"]
    assert http.request("DELETE", path, json={"filter": {"n": {"lte": -10}}}).json() == {"deleted": 10}
    assert len(http.get(path).json()["memories"]) == 10
    assert http.get(f"/v1/users/{user}").json()["resident"]
    assert http.delete(f"/v1/users/{user}").json()["deleted"] == 10
    assert http.get(f"/v1/users/{user}").json()["memories"] == 0
    assert http.post(f"{path}/search", json={"query": "changed"}).json()["results"] == []


def test_export_import_export_is_the_same_byte_for_byte(http: httpx.Client, user: str) -> None:
    fill(http, user, 900)
    for n in range(0, 900, 50):
        http.patch(f"/v1/users/{user}/memories/{n}", json={"text": f"changed {n}"})
    first = http.get(f"/v1/users/{user}/export").content
    assert first.count(b"\n") == 900
    copy = f"copy-of-{user}"
    assert http.post(f"/v1/users/{copy}/import", content=first).json() == {"imported": 900, "unchanged": 0}
    assert http.get(f"/v1/users/{copy}/export").content == first
    assert http.post(f"/v1/users/{copy}/import", content=first).json() == {"imported": 0, "unchanged": 900}


def test_an_import_is_stored_as_it_arrives(http: httpx.Client, user: str) -> None:
    seen: list[int] = []

    def slowly() -> Iterator[bytes]:
        for n in range(450):
            yield json.dumps({"id": str(n), "text": f"note {n}", "vector": [1.0] * DIM}).encode() + b"\n"
        deadline = time.monotonic() + 20
        while not seen or seen[-1] < 400:
            assert time.monotonic() < deadline
            seen.append(http.get(f"/v1/users/{user}").json()["memories"])
        yield b'{"id": "bare", "text": "without a vector"}'

    with httpx.Client(base_url=http.base_url, timeout=60.0, trust_env=False) as other:
        answer = other.post(f"/v1/users/{user}/import", content=slowly())
    assert answer.json() == {"imported": 451, "unchanged": 0}


def test_an_import_is_read_no_faster_than_it_is_written(http: httpx.Client, server: Server, user: str) -> None:
    line = json.dumps({"id": "1", "text": "x" * 60_000, "vector": [1.0] * DIM}).encode() + b"\n"
    size = 256 * 1024**2
    head = f"POST /v1/users/{user}/import HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {size}\r\n\r\n"
    stores = [psutil.Process(pid) for pid in server.replicas("Store")]
    for store in stores:
        store.suspend()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as sender:
            sender.sendall(head.encode())
            sent = 0
            with pytest.raises(TimeoutError):  # all buffers on the way are full
                while sent < size:
                    sent += sender.send(line[sent % len(line) :])
    finally:
        for store in stores:
            store.resume()
    assert http.get(f"/v1/users/{user}/export").is_success


def test_a_bad_line_of_a_large_import_is_answered(http: httpx.Client, user: str) -> None:
    good = json.dumps({"id": "1", "text": "note", "vector": [1.0] * DIM}).encode() + b"\n"
    for at in (0, 7, 3000):
        answer = http.post(f"/v1/users/{user}/import", content=good * at + b'{"id": "2"}\n' + good * 3000)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"lines.{at}.text")


def test_an_export_that_an_erasure_cuts_short_ends_with_an_error(http: httpx.Client, user: str) -> None:
    fill(http, user, 8000)
    with (
        httpx.Client(base_url=http.base_url, timeout=60.0, trust_env=False) as other,
        pytest.raises(httpx.RemoteProtocolError),
        other.stream("GET", f"/v1/users/{user}/export") as answer,
    ):
        chunks = answer.iter_raw()
        next(chunks)
        assert http.delete(f"/v1/users/{user}").json()["deleted"] == 8000
        for _ in chunks:
            pass


def files_with(folder: Path, needle: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and needle in path.read_bytes()]


def test_an_erased_text_is_in_no_file(http: httpx.Client, server: Server, user: str) -> None:
    words = [f"secret{uuid.uuid4().hex}" for _ in range(4)]
    path = f"/v1/users/{user}/memories"
    memories = [{"id": str(n), "text": f"the {word}", "metadata": {"n": n}} for n, word in enumerate(words)]
    assert http.post(path, json={"memories": memories}).status_code == 201
    deadline = time.monotonic() + 10  # a checkpoint between the reads of two files can hide a row from one look
    while not files_with(server.folder, words[0].encode()):
        assert time.monotonic() < deadline
    http.patch(f"{path}/0", json={"text": "harmless", "metadata": {}})
    http.delete(f"{path}/0")
    http.delete(f"{path}/1")
    http.request("DELETE", path, json={"filter": {"n": 2}})
    http.delete(f"/v1/users/{user}")
    deadline = time.monotonic() + 60
    while found := [path for word in words for path in files_with(server.folder, word.encode())]:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def kill_a_store_replica(server: Server) -> None:
    psutil.Process(min(server.replicas("Store"))).kill()


def test_an_import_and_an_export_are_complete_although_a_replica_dies(
    http: httpx.Client, server: Server, user: str
) -> None:
    lines = [
        json.dumps({"id": str(n), "text": f"note {n}", "vector": [float(n % 7 + 1)] * DIM}).encode() + b"\n"
        for n in range(4000)
    ]

    def killing_a_replica() -> Iterator[bytes]:
        yield from lines[:1000]
        kill_a_store_replica(server)
        yield from lines[1000:]

    done = http.post(f"/v1/users/{user}/import", content=killing_a_replica()).json()
    assert sum(done.values()) == 4000, done
    with http.stream("GET", f"/v1/users/{user}/export") as answer:
        chunks = answer.iter_raw()
        given = next(chunks)
        kill_a_store_replica(server)
        given += b"".join(chunks)
    assert [json.loads(line)["id"] for line in given.splitlines()] == [str(n) for n in range(4000)]
    assert http.get(f"/v1/users/{user}/export").content == given
