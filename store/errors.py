"""The errors of the store, and `LocatedError`, the base of every error that a caller may see.

StoreError
├── InvalidInput      the request can never succeed; `position` and `field` locate the invalid value
├── NotFound          no such memory or user
├── Conflict          the state of the log contradicts the request
├── QuotaExceeded     the tenant would hold more than it may
├── LogUnavailable    the log cannot be read or written at the moment; safe to retry unless `code` is outcome_unknown
├── LogDamaged        the log's file or rows are damaged; damaged data is never served
├── SchemaMismatch    the log was written by a newer version of the schema
└── ModelMismatch     the log was filled by another model

Every error survives pickling: it takes positional arguments and passes them to `super().__init__`.
"""

from __future__ import annotations

from typing import Self

OUTCOME_UNKNOWN = "outcome_unknown"
"""The code of an error after which a write may have been made."""


class LocatedError(Exception):
    """An error with the path of the invalid value in the request. As a string it is `3.text: must not be empty`.

    Args:
        message: one sentence for the caller. It does not name the field: `str` puts the path in front of it.
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
        return self.message if self.param is None else f"{self.param}: {self.message}"

    @property
    def param(self) -> str | None:
        """The path as far as it is known: `3.text` for the field `text` of the item 3."""
        parts = [part for part in (self.position, self.field) if part is not None]
        return ".".join(map(str, parts)) if parts else None

    def at(self, field: str | None, position: int | None = None) -> Self:
        """The same error about another place."""
        return type(self)(self.message, field, self.code, position, *self.args[4:])


class StoreError(LocatedError):
    """Root of the tree."""


class InvalidInput(StoreError):
    """The request can never succeed as it stands."""


class NotFound(StoreError):
    """No such memory or user."""


class Conflict(StoreError):
    """The log's state contradicts the request."""


class QuotaExceeded(StoreError):
    """The tenant would hold more than it may."""


class LogUnavailable(StoreError):
    """The log cannot be read or written at the moment (locked too long, disk full, connection lost)."""


class LogDamaged(StoreError):
    """The log's file or rows are damaged."""


class SchemaMismatch(StoreError):
    """The log was written by a newer version of the schema."""


class ModelMismatch(StoreError):
    """The log was filled by another model."""
