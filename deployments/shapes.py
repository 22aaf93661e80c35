"""The store's values as the answers that callers get. api/answers.py describes them for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from store import Appended, Event, HistoryEvent, Key, Memory, UserStats

Fields = dict[str, Any]


def added(entry: Appended, *, truncated: bool) -> Fields:
    """The result of adding one memory; `truncated` only if its text was cut."""
    fields: Fields = {"id": entry.id, "status": entry.status, "version": entry.version}
    return {**fields, "truncated": True} if truncated else fields


def memory(found: Memory, *, truncated: bool = False) -> Fields:
    """The fields of a memory, of which some are there only if they are set.

    Args:
        truncated: its text was cut before it was embedded.
    """
    fields: Fields = {
        "id": found.id,
        "user_id": found.user_id,
        "text": found.text,
        "metadata": found.metadata,
        "created_at": found.created_at,
        "updated_at": found.updated_at,
        "version": found.version,
    }
    for name in ("expires_at", "happened_at", "thread", "score", "scores", "vector"):
        value = getattr(found, name)
        if value is not None:
            fields[name] = value
    if truncated:
        fields["truncated"] = True
    return fields


_WITHOUT_CONTENT = ("id", "user_id", "created_at", "updated_at", "version", "truncated")


def changed(found: Memory, *, truncated: bool = False) -> Fields:
    """The fields of a memory that was changed by a caller that may not read it."""
    fields = memory(found, truncated=truncated)
    return {name: fields[name] for name in _WITHOUT_CONTENT if name in fields}


def event(state: HistoryEvent) -> Fields:
    """The fields of a state of a memory; without text and metadata if they were erased."""
    fields: Fields = {"event": state.event, "at": state.at, "version": state.version}
    if state.text is not None:
        fields |= {"text": state.text, "metadata": state.metadata}
    return fields


def audited(event: Event) -> Fields:
    """The fields of an event of the audit; `status` and `code` only if it is a refusal."""
    fields: Fields = {
        "at": event.at,
        "action": event.action,
        "key_id": event.key_id,
        "user_id": event.user_id,
        "ids": event.ids,
        "count": event.count,
    }
    return fields if event.status is None else {**fields, "status": event.status, "code": event.code}


def user(stats: UserStats) -> Fields:
    """The fields of a user in a list."""
    return {"user_id": stats.user_id, "memories": stats.memories, "version": stats.version, "bytes": stats.bytes}


def key(found: Key) -> Fields:
    """The fields of a key."""
    return {
        "id": found.id,
        "tenant": found.tenant,
        "user_id": found.user_id,
        "scopes": list(found.scopes),
        "label": found.label,
        "created_at": found.created_at,
        "expires_at": found.expires_at,
        "used_at": found.used_at,
        "revoked_at": found.revoked_at,
        "requests_per_minute": found.requests_per_minute,
        "tokens_per_minute": found.tokens_per_minute,
    }
