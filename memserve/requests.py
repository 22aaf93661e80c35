"""What the calls (memserve/calls.py) ask of a transport. Nothing here knows how a request is carried.

A request has the name and the arguments of a method of the server's handle (docs/handle.md), whichever transport
carries it, and its answer is what that method returns.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from memserve.errors import BadRequest, MemserveError

T = TypeVar("T")

Line = str | bytes | Mapping[str, Any]
Lines = Iterable[Line] | AsyncIterable[Line] | str | os.PathLike[str]

WRITES = frozenset(
    {"add", "add_many", "delete", "delete_many", "delete_user", "delete_where", "import_lines", "update"}
)
"""The requests that write."""


class Request:
    """One request.

    Attributes:
        name: of the method.
        arguments: its positional arguments.
        options: its keyword arguments, without those that are not given.
        key: by which the server recognises a write that is sent again; None for a read.
    """

    __slots__ = ("arguments", "key", "name", "options")

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        self.name = name
        self.arguments = arguments
        self.options = options
        self.key = uuid.uuid4().hex if name in WRITES else None

    def about(self, *arguments: Any) -> Request:
        """The same request, with its key, about other arguments."""
        other = Request(self.name, *arguments, **self.options)
        other.key = self.key
        return other

    @property
    def streams(self) -> bool:
        """Whether the request carries lines of any number, so that no time is set for it as a whole."""
        return any(isinstance(argument, Upload) for argument in self.arguments)

    @property
    def may_be_sent_again(self) -> bool:
        """Whether the request can be sent a second time.

        A stream that has been read cannot. If the request makes a key, a second one would be made.
        """
        uploads = [argument for argument in self.arguments if isinstance(argument, Upload)]
        return self.name != "create_key" and all(upload.replayable for upload in uploads)

    def __repr__(self) -> str:
        return f"{self.name}{self.arguments!r}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A request for some items of a longer list, which begin at the item `first`."""

    request: Request
    first: int
    items: int

    @contextmanager
    def located(self) -> Iterator[None]:
        """A context for sending the piece: an error gets the position of its item in the list."""
        try:
            yield
        except MemserveError as error:
            raise error.in_piece(self.first) from error


@dataclass(frozen=True, slots=True)
class Batch:
    """The pieces of a list. Their answers are in the order of the pieces.

    Attributes:
        title, unit: of the progress bar.
        in_order: a piece is sent when the one before it has been answered. Otherwise several are in flight.
    """

    pieces: Sequence[Piece]
    title: str
    unit: str
    in_order: bool = False

    @property
    def items(self) -> int:
        """The items of all pieces."""
        return sum(piece.items for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Pages(Generic[T]):
    """A list that is answered in pages: of the answer's field `items`, each made by `make`."""

    request: Request
    items: str
    make: Callable[[Any], T]

    def found(self, answer: Mapping[str, Any]) -> Iterator[T]:
        """The items of one page."""
        return map(self.make, answer[self.items])

    def after(self, answer: Mapping[str, Any]) -> Request | None:
        """The request for the next page; None after the last one."""
        cursor = answer["next_cursor"]
        if cursor is None:
            return None
        return Request(self.request.name, *self.request.arguments, **{**self.request.options, "cursor": cursor})


@dataclass(frozen=True, slots=True)
class Download(Generic[T]):
    """An answer that is streamed: lines with their newlines, each made into an item by `make`."""

    request: Request
    title: str
    make: Callable[[bytes], T]
    show_progress: bool | None = None

    def bar(self) -> tqdm:
        """A progress bar that counts lines."""
        return progress_bar(self.title, "memory", None, self.show_progress)


@dataclass(frozen=True, slots=True)
class Upload:
    """Lines of NDJSON that are streamed to the server: from a file, or from any iterable of lines or mappings."""

    lines: Lines
    title: str = ""
    show_progress: bool | None = field(default=None, compare=False)

    @property
    def replayable(self) -> bool:
        """Whether the lines can be read a second time."""
        return isinstance(self.lines, str | os.PathLike | Sequence)

    @property
    def is_async(self) -> bool:
        """Whether the lines come from an async iterable."""
        return isinstance(self.lines, AsyncIterable)

    def __iter__(self) -> Iterator[bytes]:
        if isinstance(self.lines, AsyncIterable):
            raise TypeError("an async iterable can be imported by AsyncClient only")
        if isinstance(self.lines, str | os.PathLike):
            with open(self.lines, "rb") as file, self._bar(os.fstat(file.fileno()).st_size) as bar:
                for line in file:
                    bar.update(len(line))
                    yield line
            return
        with self._bar(None) as bar:
            for number, given in enumerate(self.lines):
                line = _line(given, number)
                bar.update(len(line))
                yield line

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if not isinstance(self.lines, AsyncIterable):
            for line in self:
                yield line
            return
        with self._bar(None) as bar:
            number = 0
            async for given in self.lines:
                line = _line(given, number)
                number += 1
                bar.update(len(line))
                yield line

    def _bar(self, size: int | None) -> tqdm:
        return progress_bar(self.title, "B", size, self.show_progress)


def progress_bar(title: str, unit: str, total: int | None, show: bool | None) -> tqdm:
    """A progress bar on standard error.

    Args:
        show: None shows it if standard error is a terminal.
    """
    return tqdm(
        desc=title,
        unit=unit,
        total=total,
        unit_scale=unit == "B",
        disable=None if show is None else not show,
        leave=False,
        dynamic_ncols=True,
    )


def _line(given: Line, number: int) -> bytes:
    """One line with its newline."""
    if isinstance(given, Mapping):
        return to_json(given) + b"\n"
    line = (given.encode() if isinstance(given, str) else bytes(given)).rstrip(b"\r\n")
    if b"\n" in line:
        raise BadRequest(f"lines.{number}: must be one line", 400, f"lines.{number}")
    return line + b"\n"


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. Raises TypeError if the value holds anything else than JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
