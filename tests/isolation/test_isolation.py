"""Each tenant, and each user with a key of its own, sees exactly what a private server would have shown it.

Two tenants and two users of a third one use the same ids of users and memories. They play random operations on a server
that they share, all at the same time, and each the same operations on a server of its own. The answers are compared.
"""

import asyncio
import inspect
import itertools
import random
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from starlette.routing import Route

from deployments.api import docs
from deployments.service import Memserve
from tests.api.test_authentication import Caller
from tests.isolation.plays import METHODS, ROUTES, SELDOM
from tests.isolation.sides import Side
from tests.local_app import LocalApp
from tests.repetitions import repetitions

OPERATIONS = repetitions(10_000, quick=300)
SHOWN = 12  # operations before a difference
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)  # for counts of refusals, which are of a minute
HANDLE_SHARE = 0.25
EVERYTHING = ("read", "write", "admin")
WRITER = ("read", "write")


class Participant:
    """A tenant or a bound user, on the shared server and on its private one.

    Args:
        handle: whether it calls the handle API, too, which reaches a whole tenant.
    """

    def __init__(self, name: str, seed: int, tenant: str, sides: tuple[Side, Side], *, handle: bool) -> None:
        self._name = name
        self._rng = random.Random(f"{name} {seed}")
        self._tenant = tenant
        self._sides = sides
        self._handle = handle
        self._done: deque[str] = deque(maxlen=SHOWN)

    async def play(self) -> None:
        """Make one operation on both servers, and compare what they answer."""
        rng = self._rng
        if self._handle and rng.random() < HANDLE_SHARE:
            method = rng.choice([*METHODS])
            arguments, options = METHODS[method](rng)
            self._done.append(f"{method}(*{arguments}, **{options})")
            shared, private = [
                await side.call(method, arguments, {**options, "tenant": self._tenant}) for side in self._sides
            ]
        else:
            route = rng.choice([*ROUTES])
            if route in SELDOM and rng.random() < 0.6:
                route = ("POST", "/v1/users/{user_id}/memories")
            path, options = ROUTES[route](rng)
            name = " ".join(route)
            self._done.append(f"{name} {path} {options}")
            shared, private = [await side.request(name, route[0], path, options) for side in self._sides]
        assert shared == private, f"{self._name}, after the operations\n" + "\n".join(self._done)


@pytest.fixture
async def apps() -> AsyncIterator[Any]:
    """A function that starts an application with a log of its own."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_memory())))
        names = map(str, itertools.count())

        async def start() -> LocalApp:
            own = folder / next(names)
            own.mkdir()
            app = await LocalApp.start(own, auth={"mode": "keys"}, store={"url": f"sqlite:///{own}/log.db"})
            app.gateway.refused._now = lambda: NOW
            stack.push_async_callback(app.stop)
            return app

        yield start


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.mark.timeout(600)
async def test_each_sees_what_a_private_server_would_show(apps: Any) -> None:
    shared = await apps()
    participants = []
    for name, tenant, options in (
        ("acme", "acme", {"scopes": EVERYTHING}),
        ("other", "other", {"scopes": EVERYTHING}),
        ("ann of third", "third", {"scopes": WRITER, "user_id": "ann"}),
        ("bob of third", "third", {"scopes": WRITER, "user_id": "bob"}),
    ):
        sides = [Side(app, await app.make_key(tenant, **options)) for app in (shared, await apps())]
        handle = "user_id" not in options
        participants.append(Participant(name, 1, tenant, (sides[0], sides[1]), handle=handle))
    for _ in range(OPERATIONS // len(participants)):
        await asyncio.gather(*(participant.play() for participant in participants))


def test_every_route_is_played(app: LocalApp) -> None:
    """The list comes from the application: a new route needs a play."""
    documentation = docs.PATHS | {"/openapi.json"}
    found = {
        (method, route.path)
        for route in app.api.routes
        if isinstance(route, Route) and route.path not in documentation
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(ROUTES) == found


def test_every_handle_method_of_a_tenant_is_played() -> None:
    found = {
        name
        for name, method in inspect.getmembers(Memserve, inspect.isfunction)
        if not name.startswith("_") and "tenant" in inspect.signature(method).parameters
    }
    assert set(METHODS) == found


@contextmanager
def statements(app: LocalApp) -> Iterator[list[str]]:
    """The SQL statements of a store while the context lasts, without those of background work."""
    said: list[str] = []

    def remember(_: Any, __: Any, statement: str, *rest: Any) -> None:
        said.append(statement)

    engine = app.store.deployment._store.log.engine
    event.listen(engine, "before_cursor_execute", remember)
    yield said
    event.remove(engine, "before_cursor_execute", remember)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/users/{user}/memories/m", None),
        ("GET", "/v1/users/{user}/memories/m/history", None),
        ("PATCH", "/v1/users/{user}/memories/m", {"metadata": {}}),
        ("DELETE", "/v1/users/{user}/memories/m", None),
        ("POST", "/v1/users/{user}/memories/search", {"query": "tea"}),
        ("GET", "/v1/users/{user}", None),
    ],
)
@pytest.mark.parametrize("bound", [False, True])
async def test_what_belongs_to_others_takes_the_statements_of_what_never_was(
    apps: Any, method: str, path: str, body: Any, bound: bool
) -> None:
    """So neither the words of an answer nor its time tell them apart."""
    app = await apps()
    app.store.deployment._background.cancel()
    owner = Caller(app, await app.make_key("acme"))
    await owner("POST", "/v1/users/ann/memories", json={"text": "tea", "id": "m"})
    reader = Caller(app, await app.make_key("acme" if bound else "other", user_id="bob" if bound else None))
    await reader(method, path.format(user="warm"), json=body)  # looks the key up
    answers, asked = [], []
    for user in ("ann", "eve"):
        with statements(app) as said:
            answer = await reader(method, path.format(user=user), json=body)
        answers.append((answer.status_code, answer.text.replace(user, "USER")))
        asked.append(said)
    assert answers[0] == answers[1]
    assert asked[0] == asked[1]
    assert bound is (asked[0] == [])
