"""The arguments of handle calls that no body or query has: the tenant, lists, and the ids that a route has in its path.

Each function returns its argument, or what it stands for, if it is valid, and raises InvalidRequest if not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from deployments.errors import InvalidRequest
from deployments.requests.bodies import check
from deployments.requests.fields import NewId, StoredId
from deployments.requests.principal import Principal


class _Ids(BaseModel):
    model_config = ConfigDict(strict=True)


class _Tenant(_Ids):
    tenant: NewId


class _Key(_Ids):
    key_id: StoredId


class _NewUser(_Ids):
    user_id: NewId


class _User(_Ids):
    user_id: StoredId


class _Memory(_User):
    memory_id: StoredId


def principal(tenant: str) -> Principal:
    """The principal of a handle call for a tenant."""
    return Principal.of_tenant(check(_Tenant, {"tenant": tenant}).tenant)


def key(key_id: str) -> str:
    """The id of a key."""
    return check(_Key, {"key_id": key_id}).key_id


def items(given: Any, name: str) -> list[Any]:
    """The items of a list; a single item is not a list. Mappings among them become dicts."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence):
        raise InvalidRequest("must be a list", name)
    return [dict(item) if isinstance(item, Mapping) else item for item in given]


def new_user(user_id: str) -> str:
    """The id of a user that may not exist yet."""
    return check(_NewUser, {"user_id": user_id}).user_id


def user(user_id: str) -> str:
    """The id of a user."""
    return check(_User, {"user_id": user_id}).user_id


def memory(user_id: str, memory_id: str) -> tuple[str, str]:
    """The ids of a memory and its user."""
    ids = check(_Memory, {"user_id": user_id, "memory_id": memory_id})
    return ids.user_id, ids.memory_id
