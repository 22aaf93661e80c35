"""NDJSON in pieces: lines from chunks that are cut anywhere, and vectors for lines that have none."""

import asyncio
import pickle
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.calls.transfer import MAX_EMPTY_BYTES, PIECE_BYTES, PIECE_LINES, LongLines, import_pieces, split_lines
from deployments.errors import InvalidRequest, Overloaded, TooLarge, Unauthorized
from store import Imported, ImportLine, InvalidInput

VECTOR = [1.0, 2.0]


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def line(id: str, **fields: object) -> bytes:
    return orjson.dumps({"id": id, "text": f"text {id}", **fields}) + b"\n"


class Target:
    """Records the pieces that are written and the texts that are embedded."""

    def __init__(self) -> None:
        self.pieces: list[Sequence[ImportLine]] = []
        self.embedded: list[list[str]] = []
        self.may_write: int | None = None

    @property
    def positions(self) -> list[list[int]]:
        return [[line.position for line in piece] for piece in self.pieces]

    async def check(self) -> None:
        if len(self.pieces) == self.may_write:
            raise Unauthorized("no more")

    async def embed(self, texts: list[str]) -> np.ndarray:
        self.embedded.append(texts)
        for n, text in enumerate(texts):
            if text == "poison":
                raise InvalidRequest("no", None, None, n)
        return np.full((len(texts), 2), 0.5, np.float32)

    async def write(self, piece: Sequence[ImportLine]) -> Imported:
        self.pieces.append(piece)
        return Imported(len(piece), 0)

    async def run(self, data: bytes, max_line_bytes: int = 1 << 20) -> Imported:
        return await import_pieces(
            stream([data]),
            max_line_bytes=max_line_bytes,
            long_lines=LongLines(max_line_bytes),
            check=self.check,
            embed=self.embed,
            write=self.write,
        )


@given(st.lists(st.binary(max_size=12).filter(lambda each: b"\n" not in each), max_size=8), st.data())
async def test_lines_do_not_depend_on_where_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = [each async for each in split_lines(stream(chunks), 100, LongLines(5))]
    if lines and not lines[-1]:  # the last newline is not followed by another line
        lines = lines[:-1]
    assert found == lines


async def test_a_line_is_refused_as_soon_as_it_is_too_long() -> None:
    given = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given
        yield b"short\n"
        while True:
            given += 10
            yield b"x" * 10

    found = []
    with pytest.raises(TooLarge) as refused:
        async for each in split_lines(endless(), 35, LongLines(5)):
            found.append(each)
    assert (found, given, refused.value.param) == ([b"short"], 40, "1")


async def test_pieces_are_bounded_and_counted_through() -> None:
    target = Target()
    count = 2 * PIECE_LINES + 50
    data = b"".join(line(str(n), vector=VECTOR) for n in range(count))
    assert await target.run(data) == Imported(count, 0)
    assert target.positions == [list(range(200)), list(range(200, 400)), list(range(400, 450))]
    assert [each.id for piece in target.pieces for each in piece] == [str(n) for n in range(count)]
    assert target.embedded == []

    target = Target()
    large = line("1", vector=VECTOR, metadata={"x": "y" * (PIECE_BYTES // 2)})
    await target.run(large * 5)
    assert target.positions == [[0, 1], [2, 3], [4]]


async def test_empty_lines_count_and_are_not_written() -> None:
    target = Target()
    data = b"\n" * 450 + b" \r\n" + line("1", vector=VECTOR).strip() + b"\r\n\n"
    assert await target.run(data) == Imported(1, 0)
    assert target.positions == [[451]]
    assert target.pieces[0][0].id == "1"
    target = Target()
    assert await target.run(b"\n\n \n") == Imported(0, 0)
    assert target.pieces == []


async def test_only_lines_without_a_vector_are_embedded() -> None:
    target = Target()
    lines = [
        line("0", vector=VECTOR, model="other"),
        line("1", model="other", history=[]),
        line("2", vector=None),
        line("3", vector=VECTOR),
    ]
    await target.run(b"".join(lines))
    assert target.embedded == [["text 1", "text 2"]]
    (piece,) = target.pieces
    vectors = [each.vector.tolist() for each in piece if each.vector is not None]
    assert vectors == [VECTOR, [0.5, 0.5], [0.5, 0.5], VECTOR]
    assert [each.model for each in piece] == ["other", None, None, None]


async def test_a_line_that_is_embedded_keeps_its_numbers() -> None:
    target = Target()
    metadata = '{"n":[-9223372036854775808,9223372036854775807,1e+300,-0.0,1.0]}'
    await target.run(f'{{"id": "ü", "vector": null, "text": "a", "metadata": {metadata}}}'.encode())
    ((sent,),) = target.pieces
    assert (sent.id, sent.text, sent.metadata) == ("ü", "a", metadata)
    for number in (18446744073709551616, -9223372036854775809):
        with pytest.raises(InvalidInput) as refused:
            await target.run(f'{{"id": "1", "text": "a", "metadata": {{"n": [{number}]}}}}'.encode())
        assert refused.value.param == "0.metadata.n.0"
    assert target.embedded == [["a"]]


async def test_parsed_lines_survive_pickling() -> None:
    target = Target()
    await target.run(line("1", metadata={"a": [1, None]}, expires_at="2100-01-01T00:00:00Z"))
    ((sent,),) = target.pieces
    ((got,),) = pickle.loads(pickle.dumps(target.pieces))
    assert got._replace(vector=None) == sent._replace(vector=None)
    assert (got.vector.dtype, got.vector.tolist()) == (np.float32, [0.5, 0.5])


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (b"{", "203"),
        (b"[]", "203"),
        (b'"text"', "203"),
        (b"\xff", "203"),
        (b'{"id": "1"}', "203.text"),
        (b'{"text": "no id"}', "203.id"),
        (b'{"id": "1", "text": "a", "vector": "x"}', "203.vector"),
        (b'{"id": "1", "text": "a", "metadata": {"a": 1e999}}', "203.metadata.a"),
        (b'{"id": "1", "text": "a", "metadata": {"a": NaN}}', "203"),
        (b'{"id": "1", "text": 5}', "203.text"),
        (b'{"id": "1", "text": " "}', "203.text"),
        (b'{"id": "1", "text": "poison"}', "203.text"),
        (b'{"id": "1", "text": "a", "metadata": {"a": ' + b"[" * 300 + b"]" * 300 + b"}}", "203"),
    ],
)
async def test_a_bad_line_is_named_and_the_pieces_before_it_are_written(bad: bytes, param: str) -> None:
    target = Target()
    data = b"".join(line(str(n), vector=VECTOR) for n in range(PIECE_LINES)) + line("a") + line("b") + b"\n" + bad
    with pytest.raises(InvalidRequest if b"poison" in bad else InvalidInput) as refused:
        await target.run(data)
    assert refused.value.param == param
    assert target.positions == [list(range(PIECE_LINES))]
    assert target.embedded == ([["text a", "text b", "poison"]] if b"poison" in bad else [])


async def test_one_long_line_at_a_time_is_held_in_memory() -> None:
    """The second import stops at its long line until the first has written its own, or has failed."""
    long_lines = LongLines(1000)
    written: list[str] = []
    first_may_write = asyncio.Event()

    async def write(piece: Sequence[ImportLine]) -> Imported:
        if piece[0].id == "first":
            await first_may_write.wait()
        if piece[0].id == "bad":
            raise ValueError(piece[0].id)
        written.append(piece[0].id)
        return Imported(len(piece), 0)

    def start(*ids: str) -> asyncio.Task[Imported]:
        async def chunks() -> AsyncIterator[bytes]:
            for id in ids:
                data = line(id, vector=VECTOR, metadata={"long": "x" * PIECE_BYTES})
                yield data[:2000]
                yield data[2000:]

        running = import_pieces(
            chunks(),
            max_line_bytes=1 << 22,
            long_lines=long_lines,
            check=Target().check,
            embed=Target().embed,
            write=write,
        )
        return asyncio.create_task(running)

    first, second = start("first"), start("second", "third")
    await asyncio.sleep(0.05)
    assert (written, long_lines.one_is_held) == ([], True)
    first_may_write.set()
    assert (await first, await second) == (Imported(1, 0), Imported(2, 0))
    assert written == ["first", "second", "third"]
    with pytest.raises(ValueError, match="bad"):
        await start("bad")
    assert not long_lines.one_is_held


async def test_a_long_line_that_does_not_end_holds_up_no_other_import_for_long() -> None:
    long_lines = LongLines(5, wait_s=0.01)
    may_end = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"x" * 10
        await may_end.wait()

    async def read(chunks: AsyncIterable[bytes]) -> list[bytes]:
        return [each async for each in split_lines(chunks, 100, long_lines)]

    first = asyncio.create_task(read(stalled()))
    await asyncio.sleep(0)
    assert await read(stream([b"a\nb"])) == [b"a", b"b"]
    with pytest.raises(Overloaded):
        await read(stream([b"y" * 10]))
    may_end.set()
    assert await first == [b"x" * 10]
    assert not long_lines.one_is_held


async def test_empty_lines_are_bounded() -> None:
    """A compressed body could hold millions of them in a few bytes."""
    target = Target()
    spaced = b"\n  \n".join(line(str(n), vector=VECTOR) for n in range(50))
    assert await target.run(spaced) == Imported(50, 0)
    for flood in (b"\n" * (MAX_EMPTY_BYTES + 1), (b" " * 1023 + b"\n") * 65):
        with pytest.raises(InvalidRequest) as refused:
            await target.run(flood)
        assert (refused.value.code, refused.value.position) == ("too_many_empty_lines", flood.count(b"\n") - 1)
    assert await target.run(b"\n" * MAX_EMPTY_BYTES) == Imported(0, 0)
    whole = line("1", vector=VECTOR) + b"\n" * (MAX_EMPTY_BYTES + len(line("1", vector=VECTOR)) - 1)
    assert await target.run(whole) == Imported(1, 0)
    with pytest.raises(InvalidRequest):
        await target.run(whole + b"\n")


async def test_an_import_that_may_not_go_on_names_the_first_line_that_is_not_written() -> None:
    target = Target()
    target.may_write = 1
    data = b"\n" + b"".join(line(str(n)) for n in range(2 * PIECE_LINES))
    with pytest.raises(Unauthorized) as refused:
        await target.run(data)
    assert refused.value.position == PIECE_LINES == target.positions[0][-1] + 1
    assert len(target.pieces) == len(target.embedded) == 1
