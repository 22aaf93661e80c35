"""The errors of the store. All survive pickling: positional arguments, passed to `super().__init__`.

StoreError
├── InvalidInput      the request can never succeed; `param` is the path of the field
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


class StoreError(Exception):
    """Root of the tree.

    Args:
        message: one sentence for the caller.
        param: path of the offending field (`filter.AND.0.age`), if there is one.
        code: stable machine-readable reason, if there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


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
