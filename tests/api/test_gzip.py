"""Bodies that are compressed by gzip, in this process."""

import gzip
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from deployments.api.gzip import PIECE_BYTES, unzipped
from deployments.errors import InvalidRequest
from tests.local_app import LocalApp

GZIP = {"content-encoding": "gzip"}


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def pieces_of(chunks: Iterable[bytes]) -> list[bytes]:
    return [piece async for piece in unzipped(stream(chunks))]


def bomb(mebibytes: int) -> bytes:
    """White space, compressed to a thousandth."""
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*(packer.compress(b" " * (1 << 20)) for _ in range(mebibytes)), packer.flush()])


@pytest.mark.parametrize("length", [1, 7, 1 << 20])
@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
async def test_a_stream_is_unpacked_however_it_is_cut(length: int, size: int) -> None:
    for content in (b"a" * size, b"abc" * (size // 3) + b"d" * (size % 3)):
        packed = gzip.compress(content)
        pieces = await pieces_of(packed[n : n + length] for n in range(0, len(packed), length))
        assert b"".join(pieces) == content
        assert max(map(len, pieces), default=0) <= PIECE_BYTES


async def test_members_are_joined() -> None:
    packed = gzip.compress(b"green ") + gzip.compress(b"") + gzip.compress(b"tea")
    for cut in range(len(packed)):
        assert b"".join(await pieces_of([packed[:cut], b"", packed[cut:]])) == b"green tea"
    assert await pieces_of([]) == []


@pytest.mark.parametrize(
    "packed",
    [b"{}", gzip.compress(b"green tea")[:-1], gzip.compress(b"tea") + b"x", zlib.compress(b"tea"), b"\x1f"],
    ids=[
        "not packed",
        "cut off",
        "a byte too many",
        "zlib",
        "one byte",
    ],  # gzip writes the time, and ids must not differ
)
async def test_what_gzip_did_not_write_is_refused(api: httpx.AsyncClient, packed: bytes) -> None:
    with pytest.raises(InvalidRequest):
        await pieces_of([packed])
    answer = await api.post("/v1/embeddings", content=packed, headers=GZIP)
    error = answer.json()["error"]
    assert (answer.status_code, error["message"], error["code"]) == (400, "The body is not valid gzip.", "invalid_gzip")


async def test_every_route_with_a_body_reads_gzip(app: LocalApp) -> None:
    user = "/v1/users/ann"

    async def send(method: str, path: str, body: Any, encoding: str = "gzip") -> Any:
        headers = {"content-encoding": encoding}
        answer = await app.http.request(method, path, content=gzip.compress(orjson.dumps(body)), headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    plain = (await app.http.post("/v1/embeddings", json={"input": "tea"})).json()
    for encoding in ("gzip", "GZIP", "x-gzip"):
        assert await send("POST", "/v1/embeddings", {"input": "tea"}, encoding) == plain
    assert await send("POST", "/embed", {"inputs": "tea"}) == [plain["data"][0]["embedding"]]
    assert await send("POST", "/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a"]}}) == [
        pytest.approx(1)
    ]
    assert len(await send("POST", "/tokenize", {"inputs": "tea"})) == 1
    assert await send("POST", "/decode", {"ids": [3]}) == ["<3>"]
    assert (await send("POST", f"{user}/memories", {"text": "tea", "id": "1"}))["version"] == 1
    assert len((await send("POST", "/v1/memories", {"memories": [{"user_id": "ann", "text": "a"}]}))["memories"]) == 1
    assert len((await send("POST", f"{user}/memories/search", {"query": "tea"}))["results"]) == 2
    assert (await send("PATCH", f"{user}/memories/1", {"text": "coffee"}))["text"] == "coffee"
    assert await send("POST", f"{user}/import", {"id": "2", "text": "a train"}) == {"imported": 1, "unchanged": 0}
    assert await send("DELETE", f"{user}/memories", {"filter": {"created_at": {"gt": "2000-01-01T00:00:00Z"}}}) == {
        "deleted": 3
    }


async def test_a_write_that_is_sent_again_is_the_same_whether_it_is_compressed(api: httpx.AsyncClient) -> None:
    key = {"idempotency-key": "k"}
    body = orjson.dumps({"text": "tea"})
    plain = await api.post("/v1/users/ann/memories", content=body, headers=key)
    packed = await api.post("/v1/users/ann/memories", content=gzip.compress(body), headers=key | GZIP)
    assert packed.json() == plain.json()


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "none"])
async def test_other_encodings_are_refused(api: httpx.AsyncClient, encoding: str) -> None:
    for path in ("/v1/embeddings", "/v1/users/ann/memories", "/v1/users/ann/import"):
        answer = await api.post(path, content=b"{}", headers={"content-encoding": encoding})
        assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip")
        assert answer.json()["error"] == {
            "message": f"The body has the encoding {encoding!r}; gzip is read.",
            "type": "invalid_request_error",
            "param": None,
            "code": "unsupported_encoding",
        }
    for encoding_of_nothing in ("", "identity"):
        headers = {"content-encoding": encoding_of_nothing}
        assert (await api.post("/v1/embeddings", json={"input": "tea"}, headers=headers)).status_code == 200


async def test_a_bomb_is_refused_before_it_is_unpacked_beyond_the_limit(tmp_path: Path) -> None:
    limits = {"max_body_bytes": 1 << 20, "max_import_line_bytes": 1 << 20}
    app = await LocalApp.start(tmp_path, gateway=limits)
    packed = bomb(256)
    assert len(packed) < 1 << 20
    for path, code in (
        ("/v1/embeddings", "body_too_large"),
        ("/v1/users/ann/memories", "body_too_large"),
        ("/v1/users/ann/import", "line_too_large"),
    ):
        tracemalloc.start()
        answer = await app.http.post(path, content=packed, headers=GZIP)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, code)
        assert peak < 8 << 20
    exact = gzip.compress(b"{" + b" " * ((1 << 20) - 1))
    assert (await app.http.post("/v1/embeddings", content=exact, headers=GZIP)).status_code == 400
    over = gzip.compress(b" " * ((1 << 20) + 1))
    assert (await app.http.post("/v1/embeddings", content=over, headers=GZIP)).status_code == 413
    await app.stop()


async def test_a_body_that_unpacks_to_nothing_is_refused_at_the_limit(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, gateway={"max_body_bytes": 1 << 20})
    sent = 0

    async def empty_members() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 20_000
            yield gzip.compress(b"") * 1000

    answer = await app.http.post("/v1/embeddings", content=empty_members(), headers=GZIP)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert sent == 1_060_000  # the first of its chunks that exceeds the limit
    await app.stop()


async def test_the_rest_of_a_chunk_is_not_copied_for_each_member(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    class Recorded:
        def __init__(self, wbits: int) -> None:
            self.member = real(wbits)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            given.append(len(data))
            return self.member.decompress(data, max_length)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.member, name)

    real = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", Recorded)
    packed = gzip.compress(b"a") * 10_000
    assert b"".join(await pieces_of([packed])) == b"a" * 10_000
    assert max(given) == 4096
    assert sum(given) < 110 * len(packed)


async def test_an_import_of_many_lines_is_unpacked_as_it_arrives(app: LocalApp) -> None:
    lines = b"".join(orjson.dumps({"id": str(n), "text": f"w{n % 7}"}) + b"\n" for n in range(500))
    packed = gzip.compress(lines)
    chunks = [packed[n : n + 100] for n in range(0, len(packed), 100)]
    answer = await app.http.post("/v1/users/ann/import", content=stream(chunks), headers=GZIP)
    assert answer.json() == {"imported": 500, "unchanged": 0}
