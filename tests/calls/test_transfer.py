"""NDJSON in pieces: lines out of chunks that are cut anywhere, and vectors for lines that bring none."""

from collections.abc import AsyncIterator, Iterable

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.calls.transfer import PIECE_BYTES, PIECE_LINES, Piece, import_pieces, split_lines
from deployments.errors import InvalidRequest, TooLarge, located
from store import Imported

VECTOR = [1.0, 2.0]


async def stream(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def line(id: str, **fields: object) -> bytes:
    return orjson.dumps({"id": id, "text": f"text {id}", **fields}) + b"\n"


class Target:
    """Takes pieces, and embeds by counting."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.embedded: list[list[str]] = []

    async def embed(self, texts: list[str]) -> np.ndarray:
        self.embedded.append(texts)
        for n, text in enumerate(texts):
            if text == "poison":
                raise InvalidRequest("no", None, None, n)
        return np.full((len(texts), 2), 0.5, np.float32)

    async def write(self, piece: Piece) -> Imported:
        self.pieces.append(piece)
        return Imported(len([each for each in piece.lines if each]), 0)

    async def take(self, data: bytes, max_line_bytes: int = 1 << 20) -> Imported:
        with located("lines"):  # as the service does
            return await import_pieces(
                stream([data]), max_line_bytes=max_line_bytes, embed=self.embed, write=self.write
            )


@given(st.lists(st.binary(max_size=12).filter(lambda each: b"\n" not in each), max_size=8), st.data())
async def test_lines_do_not_depend_on_where_the_stream_is_cut(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = [each async for each in split_lines(stream(chunks), 100)]
    if lines and not lines[-1]:  # what follows the last newline is no line if it is empty
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
        async for each in split_lines(endless(), 35):
            found.append(each)
    assert (found, given, refused.value.param) == ([b"short"], 40, "lines.1")


async def test_pieces_are_bounded_and_counted_through() -> None:
    target = Target()
    count = 2 * PIECE_LINES + 50
    data = b"".join(line(str(n), vector=VECTOR) for n in range(count))
    assert await target.take(data) == Imported(count, 0)
    assert [(piece.first, len(piece.lines)) for piece in target.pieces] == [(0, 200), (200, 200), (400, 50)]
    assert b"".join(each + b"\n" for piece in target.pieces for each in piece.lines) == data
    assert target.embedded == []

    target = Target()
    large = line("1", vector=VECTOR, metadata={"x": "y" * (PIECE_BYTES // 2)})
    await target.take(large * 5)
    assert [(piece.first, len(piece.lines)) for piece in target.pieces] == [(0, 2), (2, 2), (4, 1)]


async def test_empty_lines_count_and_are_no_piece_of_their_own() -> None:
    target = Target()
    data = b"\n" * 450 + b" \r\n" + line("1", vector=VECTOR).strip() + b"\r\n\n"
    assert await target.take(data) == Imported(1, 0)
    assert [(piece.first, len(piece.lines)) for piece in target.pieces] == [(400, 53)]
    assert target.pieces[0].lines[51] == line("1", vector=VECTOR).strip()
    target = Target()
    assert await target.take(b"\n\n \n") == Imported(0, 0)
    assert target.pieces == []


async def test_only_lines_without_a_vector_are_embedded() -> None:
    target = Target()
    lines = [
        line("0", vector=VECTOR, model="other"),
        line("1", model="other", history=[]),
        line("2", vector=None),
        line("3", vector=VECTOR),
    ]
    await target.take(b"".join(lines))
    assert target.embedded == [["text 1", "text 2"]]
    (piece,) = target.pieces
    assert piece.lines[0] + b"\n" == lines[0]
    assert orjson.loads(piece.lines[1]) == {"id": "1", "text": "text 1", "history": [], "vector": [0.5, 0.5]}
    assert orjson.loads(piece.lines[2]) == {"id": "2", "text": "text 2", "vector": [0.5, 0.5]}


async def test_a_line_that_is_embedded_keeps_its_numbers() -> None:
    target = Target()
    metadata = '{"n": [18446744073709551616, -9223372036854775809, 9223372036854775807, 1e+300, -0.0, 1.0]}'
    await target.take(f'{{"id": "ü", "vector": null, "text": "a", "metadata": {metadata}}}'.encode())
    (sent,) = target.pieces[0].lines
    assert sent.decode() == f'{{"id": "ü", "text": "a", "metadata": {metadata}, "vector": [0.5,0.5]}}'


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (b"{", "lines.203"),
        (b"[]", "lines.203"),
        (b'"text"', "lines.203"),
        (b"\xff", "lines.203"),
        (b'{"id": "1"}', "lines.203.text"),
        (b'{"id": "1", "text": 5}', "lines.203.text"),
        (b'{"id": "1", "text": " "}', "lines.203.text"),
        (b'{"id": "1", "text": "poison"}', "lines.203.text"),
        (b'{"id": "1", "text": "a", "metadata": {"a": ' + b"[" * 300 + b"]" * 300 + b"}}", "lines.203"),
    ],
)
async def test_a_bad_line_is_named_and_the_pieces_before_it_are_written(bad: bytes, param: str) -> None:
    target = Target()
    data = b"".join(line(str(n), vector=VECTOR) for n in range(PIECE_LINES)) + line("a") + line("b") + b"\n" + bad
    with pytest.raises(InvalidRequest) as refused:
        await target.take(data)
    assert refused.value.param == param
    assert [piece.first for piece in target.pieces] == [0]
