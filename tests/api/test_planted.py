"""No log line and no answer of an error holds a text, a query, a value of metadata, a vector or a secret.

Such values are planted in requests to every route, good ones and bad ones, and in handle calls, and then looked for.
"""

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api import audit, build, embeddings, keys, memories, rerank, tei, users
from deployments.errors import MemserveError, trace_of
from deployments.serving import logs
from deployments.settings import Settings
from store import InvalidInput, Store, StoreError
from tests.api.test_authentication import Caller, caller
from tests.local_app import DIM, LocalApp
from tests.repetitions import repetitions

GROUPS = (
    embeddings.routes,
    rerank.routes,
    tei.routes,
    memories.routes,
    users.routes,
    keys.routes,
    audit.routes,
    build.operations,
)
ROUTES = sorted(route for group in GROUPS for route in group.scopes())
JSON = {"content-type": "application/json"}
SECRET = "xPLANTEDx"
NUMBER = 0.6180339887
VECTOR = [NUMBER] * DIM
MEMORY = {"text": f"{SECRET} text", "metadata": {"key": SECRET}, "vector": VECTOR}
BAD_VALUES: tuple[Any, ...] = (
    SECRET,
    [SECRET],
    {"field": SECRET},
    [{"text": SECRET, "metadata": SECRET}],
    [[SECRET]],
    [NUMBER],
    f"{SECRET}\0",
    f"{SECRET}\ud800",
)
FIELDS = (
    "text",
    "texts",
    "input",
    "inputs",
    "query",
    "documents",
    "filter",
    "metadata",
    "metadata_merge",
    "memories",
    "vector",
    "ids",
    "created_at",
    "expires_at",
    "happened_at",
    "model",
    "truncate",
    "input_type",
    "encoding_format",
    "prompt_name",
    "top_k",
    "mode",
    "order",
    "cursor",
    "after",
    "limit",
    "label",
    "scopes",
    "on_duplicate",
    "if_version",
)
GOOD: Mapping[tuple[str, str], Any] = {
    ("POST", "/v1/embeddings"): {"input": [f"{SECRET} text"]},
    ("POST", "/embed"): {"inputs": f"{SECRET} text"},
    ("POST", "/"): {"inputs": f"{SECRET} text"},
    ("POST", "/similarity"): {"inputs": {"source_sentence": SECRET, "sentences": [SECRET]}},
    ("POST", "/tokenize"): {"inputs": SECRET},
    ("POST", "/decode"): {"ids": [1, 2]},
    ("POST", "/v1/memories"): {"memories": [{"user_id": "ann", **MEMORY}]},
    ("POST", "/v1/users/{user_id}/memories"): {"memories": [{"id": "m", **MEMORY}]},
    ("POST", "/v1/users/{user_id}/memories/search"): {"query": SECRET, "filter": {"key": SECRET}},
    ("PATCH", "/v1/users/{user_id}/memories/{memory_id}"): {"text": f"{SECRET} text", "metadata": {"key": SECRET}},
    ("DELETE", "/v1/users/{user_id}/memories"): {"filter": {"key": SECRET}},
    ("POST", "/v1/rerank"): {"query": SECRET, "documents": [SECRET]},
    ("POST", "/rerank"): {"query": SECRET, "texts": [SECRET]},
}


class Lines(logging.Handler):
    """Every record of every logger, as text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += logging.Formatter("%(name)s %(levelname)s %(message)s").format(record) + "\n"


@pytest.fixture
def lines() -> Iterator[Lines]:
    root, handler = logging.getLogger(), Lines()
    memserve = logging.getLogger("memserve")
    before = root.level, list(memserve.handlers), memserve.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    logs.attach("DEBUG")
    yield handler
    root.removeHandler(handler)
    root.setLevel(before[0])
    memserve.handlers, memserve.level = before[1], before[2]


@pytest.fixture
async def keyed(tmp_path: Path, lines: Lines) -> AsyncIterator[LocalApp]:
    """An application that asks for keys, and logs everything."""
    app = await LocalApp.start(tmp_path, auth={"mode": "keys"}, log_level="DEBUG")
    yield app
    await app.stop()


def path_of(path: str) -> str:
    return path.replace(":path", "").format(user_id="ann", memory_id="m", model_id="x", key_id="0123456789abcdef")


def names_a_model(answer: httpx.Response) -> bool:
    """Whether an answer repeats the name of a model, or of its prompt, that is not there. Those are no texts."""
    error = answer.json().get("error")
    body = error if isinstance(error, dict) else answer.json()
    return body["param"] == "prompt_name" or body["code"] == "model_not_found"


def clean(text: str) -> bool:
    return SECRET not in text and str(NUMBER)[:8] not in text


async def test_requests_leave_no_trace_in_logs_and_errors(keyed: LocalApp, lines: Lines) -> None:
    one = await caller(keyed, "acme", scopes=["read", "write", "admin"])
    await one("POST", "/v1/users/ann/memories", json={"id": "m", **MEMORY})
    told: list[tuple[str, str, Any, str]] = []
    for method, path in ROUTES:
        requests: list[dict[str, Any]] = [{"params": {field: SECRET}} for field in FIELDS]
        if method != "GET":
            good = GOOD.get((method, path), {})
            bad = [{**good, field: value} for field in FIELDS for value in BAD_VALUES]
            bodies = [good, *bad[:: repetitions(1, quick=11)]]
            contents = [json.dumps(body) for body in bodies]
            contents += [f'{{"text": "{SECRET}', SECRET, f'"{SECRET}"\n', f'{{"id": "1", "text": "{SECRET}"}}\n']
            requests += [{"content": content, "headers": JSON} for content in contents]
        for request in requests:
            answer = await one(method, path_of(path), **request)
            if answer.status_code >= 400 and not clean(answer.text) and not names_a_model(answer):
                told.append((method, path, request, answer.text))
    assert told == []
    assert [line for line in lines.text.splitlines() if not clean(line)] == []


async def test_handle_calls_leave_no_trace_in_logs_and_errors(keyed: LocalApp, lines: Lines) -> None:
    gateway = keyed.gateway
    calls: list[Any] = [
        gateway.embed,
        lambda value: gateway.embed([SECRET], truncate=value),
        lambda value: gateway.add("ann", value),
        lambda value: gateway.add("ann", [{"text": SECRET, "metadata": value}]),
        gateway.add_many,
        lambda value: gateway.search("ann", SECRET, filter=value),
        lambda value: gateway.search("ann", value),
        lambda value: gateway.update("ann", "m", text=value),
        lambda value: gateway.delete_where("ann", value),
        lambda value: gateway.delete_many("ann", value),
        lambda value: gateway.list("ann", cursor=value),
        lambda value: gateway.import_lines("ann", value),
        lambda value: gateway.import_lines("ann", [{"id": "1", "text": SECRET, "vector": value}]),
    ]
    for call in calls:
        for value in BAD_VALUES:
            try:
                await call(value)
            except (MemserveError, StoreError) as error:
                assert clean(str(error)), (value, str(error))
    assert clean(lines.text)


async def test_an_unknown_error_is_logged_without_its_message(keyed: LocalApp, lines: Lines) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"about {SECRET}")

    keyed.gateway.users_body = fail  # type: ignore[method-assign]
    one = await caller(keyed, "acme")
    answer = await one("GET", "/v1/users")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "builtins.RuntimeError" in lines.text and "in fail" in lines.text
    assert clean(lines.text) and clean(answer.text)


async def test_keys_are_in_no_log_and_no_error(keyed: LocalApp, lines: Lines) -> None:
    secret = await keyed.make_key("acme")
    one = Caller(keyed, secret)
    answers = [
        await one("GET", "/v1/users"),
        await one("GET", "/v1/keys"),
        await Caller(keyed, secret + "x")("GET", "/"),
    ]
    tail = secret.split("_")[2]
    assert [answer.status_code for answer in answers] == [200, 403, 401]
    assert tail not in lines.text and not any(tail in answer.text for answer in answers)


def test_a_trace_names_the_places_and_our_own_messages() -> None:
    try:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise InvalidInput("must be a list", "ids") from error
    except InvalidInput as error:
        trace = trace_of(error)
    assert trace.splitlines()[0] == "store.errors.InvalidInput: ids: must be a list"
    assert "builtins.ValueError\n" in trace and "test_planted.py" in trace
    assert SECRET not in trace


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://someone:{SECRET}@127.0.0.1:1/nothing",
        f"postgresql+psycopg://someone:{SECRET}@127.0.0.1:1/nothing",
        f"mysql://someone:{SECRET}@127.0.0.1/nothing",
        f"postgresql://someone:{SECRET}@127.0.0.1:port/nothing",
    ],
)
def test_the_password_of_a_log_is_in_no_error(url: str, lines: Lines) -> None:
    with pytest.raises(StoreError) as refused:
        Store.open(url, dim=DIM, model="fake", lock_timeout_s=1)
    assert clean(str(refused.value)) and clean(lines.text)


def test_the_password_of_a_log_is_in_no_message_of_settings() -> None:
    with contextlib.suppress(ValueError):
        Settings.model_validate({"store": {"url": f"postgresql://someone:{SECRET}@host/x", "synchronous": "none"}})
    try:
        Settings.model_validate({"store": {"url": 1, "unknown": f"postgresql://someone:{SECRET}@host/x"}})
    except ValueError as error:
        from deployments.settings import first_problem

        assert clean(first_problem(error))  # type: ignore[arg-type]


def test_a_damaged_statement_hides_its_parameters(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/log.db", dim=DIM, model="fake")
    try:
        with pytest.raises(StoreError) as refused, store.log.write() as connection:
            connection.exec_driver_sql("INSERT INTO meta VALUES (?, NULL)", (SECRET,))
    finally:
        store.close()
    error: BaseException | None = refused.value
    while error is not None:
        assert clean(str(error)) and clean(repr(error)), error
        error = error.__cause__
