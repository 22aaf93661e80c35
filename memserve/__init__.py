"""memserve: an embedding server with a memory for each user, and its client.

    import memserve

    client = memserve.Client()
    client.add("anna", ["Anna is vegetarian.", "Anna plays the cello."])
    print(client.search("anna", "What may she eat?", top_k=1)[0])

`Client` and `AsyncClient` reach a server over HTTP, `Client.in_cluster()` over a Ray handle, and `local(path)` is the
whole of memserve in this process. They have the same calls (docs/client.md).

Importing this package imports neither Ray nor PyTorch. What it offers is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memserve.client import AsyncClient as AsyncClient
    from memserve.client import Client as Client
    from memserve.client import local as local
    from memserve.errors import BadRequest as BadRequest
    from memserve.errors import Conflict as Conflict
    from memserve.errors import DeadlineExceeded as DeadlineExceeded
    from memserve.errors import Forbidden as Forbidden
    from memserve.errors import MemserveError as MemserveError
    from memserve.errors import NotFound as NotFound
    from memserve.errors import NotReached as NotReached
    from memserve.errors import RateLimited as RateLimited
    from memserve.errors import ServerError as ServerError
    from memserve.errors import TimedOut as TimedOut
    from memserve.errors import TooLarge as TooLarge
    from memserve.errors import Unauthorized as Unauthorized
    from memserve.errors import Unavailable as Unavailable
    from memserve.results import Added as Added
    from memserve.results import Deleted as Deleted
    from memserve.results import DeletedUser as DeletedUser
    from memserve.results import Event as Event
    from memserve.results import Got as Got
    from memserve.results import Imported as Imported
    from memserve.results import Key as Key
    from memserve.results import Memory as Memory
    from memserve.results import NewKey as NewKey
    from memserve.results import Ranked as Ranked
    from memserve.results import Ready as Ready
    from memserve.results import User as User

_MODULES = {
    "client": ("AsyncClient", "Client", "local"),
    "errors": (
        "BadRequest",
        "Conflict",
        "DeadlineExceeded",
        "Forbidden",
        "MemserveError",
        "NotFound",
        "NotReached",
        "RateLimited",
        "ServerError",
        "TimedOut",
        "TooLarge",
        "Unauthorized",
        "Unavailable",
    ),
    "results": (
        "Added",
        "Deleted",
        "DeletedUser",
        "Event",
        "Got",
        "Imported",
        "Key",
        "Memory",
        "NewKey",
        "Ranked",
        "Ready",
        "User",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604 - all of them are strings


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"memserve.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
