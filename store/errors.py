"""The errors of the store. All survive pickling: positional arguments, passed to `super().__init__`.

StoreError
├── InvalidInput      the request can never succeed; `position` and `field` say where
├── NotFound          no such memory or user
├── Conflict          the log's state contradicts the request
├── LogUnavailable    the log cannot be read or written at the moment; safe to retry but where `code` is outcome_unknown
├── LogDamaged        the log's file or rows are damaged; never served in silence
├── SchemaMismatch    the log was written by another version of the schema
└── ModelMismatch     the log was filled by another model
"""

from __future__ import annotations

OUTCOME_UNKNOWN = "outcome_unknown"
"""The code of an error after which a write may have been made."""


class LocatedError(Exception):
    """An error that knows which part of the request it is about.

    Args:
        message: one sentence for the caller. It does not name the field: the path is put in front of it at the edge.
        field: path of the offending field within its item (`text`, `filter.AND.0.age`), if there is one.
        code: stable machine-readable reason, if there is one.
        position: index of the offending item in the list that the call was given, if there is one.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        code: str | None = None,
        position: int | None = None,
        *rest: object,
    ) -> None:
        super().__init__(message, field, code, position, *rest)
        self.message = message
        self.field = field
        self.code = code
        self.position = position

    def __str__(self) -> str:
        return self.message

    @property
    def param(self) -> str | None:
        """The path as far as it is known: `3.text` for the field `text` of the item 3."""
        parts = [part for part in (self.position, self.field) if part is not None]
        return ".".join(map(str, parts)) if parts else None


class StoreError(LocatedError):
    """Root of the tree."""


class InvalidInput(StoreError):
    """The request can never succeed as it stands."""


class NotFound(StoreError):
    """No such memory or user."""


class Conflict(StoreError):
    """The log's state contradicts the request."""


class LogUnavailable(StoreError):
    """The log cannot be read or written at the moment (locked too long, disk full, connection lost)."""


class LogDamaged(StoreError):
    """The log's file or rows are damaged."""


class SchemaMismatch(StoreError):
    """The log was written by a newer version of the schema."""


class ModelMismatch(StoreError):
    """The log was filled by another model."""
