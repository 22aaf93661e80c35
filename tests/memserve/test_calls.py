"""The calls of the client: one suite, run against every transport, blocking and with await."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memserve
from memserve import calls
from tests.memserve.transports import CLIENTS, DIM, Server, vectors_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module", params=CLIENTS)
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    client = CLIENTS[request.param](server)
    yield client
    client.close()


@pytest.fixture
def user() -> str:
    """A user that no other test has."""
    return f"anna/{uuid.uuid4().hex}?ü"


def test_embed_answers_a_row_for_each_text(client: Any) -> None:
    vectors = client.embed(["tea", "coffee"])
    assert (vectors.shape, vectors.dtype) == ((2, DIM), np.float32)
    assert np.array_equal(vectors, vectors_of(["tea", "coffee"]))
    assert client.embed(["tea"], dimensions=4).shape == (1, 4)
    assert client.embed(["tea"], input_type="query").shape == (1, DIM)
    vectors[0] = 0  # they belong to the caller


def test_embed_answers_small_types(client: Any) -> None:
    assert client.embed(["tea"], output_dtype="int8").dtype == np.int8
    packed = client.embed(["tea"], output_dtype="ubinary")
    assert (packed.dtype, packed.shape) == (np.uint8, (1, DIM // 8))


@pytest.mark.parametrize("name", [name for name in CLIENTS if "in process" not in name])  # test_in_process.py has those
def test_rerank_sorts_documents(server: Server, name: str) -> None:
    client = CLIENTS[name](server)
    try:
        first, second = client.rerank("green tea", ["It rains", {"text": "tea"}, "green tea"], top_n=2)
        assert (first.index, second.index) == (2, 1)
        assert first.relevance_score > second.relevance_score
        (best,) = client.rerank("green tea", ["tea"], return_documents=True)
        assert best.document == {"text": "tea"}
        with pytest.raises(memserve.BadRequest, match=r"documents\.1: must not be empty"):
            client.rerank("green tea", ["tea", ""])
    finally:
        client.close()


def test_add_takes_texts_and_mappings(client: Any, user: str) -> None:
    expires = datetime.now(UTC) + timedelta(days=1)
    first, second = client.add(
        user, ["Tea.", {"id": "c", "text": "Coffee.", "metadata": {"n": 1}, "expires_at": expires}]
    )
    assert (first.status, second.status, second.id) == ("added", "added", "c")
    assert (first.version, second.version, first.user_id, first.truncated) == (1, 2, None, False)
    found = client.get(user, "c")
    assert isinstance(found, memserve.Memory)
    assert (found.id, found.user_id, found.text, found.metadata, found.version) == ("c", user, "Coffee.", {"n": 1}, 2)
    assert (found.expires_at, found.score, found.vector) == (expires, None, None)
    assert found.created_at == found.updated_at <= datetime.now(UTC)
    assert str(found) == "Coffee."


def test_add_again_with_the_same_id(client: Any, user: str) -> None:
    memory = {"id": "c", "text": "Coffee."}
    client.add(user, [memory])
    assert client.add(user, [memory])[0].status == "unchanged"
    with pytest.raises(memserve.Conflict) as caught:
        client.add(user, [{"id": "c", "text": "Tea."}])
    assert (caught.value.status, caught.value.param, caught.value.code) == (409, "memories.0.id", "id_conflict")
    assert client.add(user, [{"id": "c", "text": "Tea."}], upsert=True)[0].status == "updated"
    assert client.add(user, ["Tea."], on_duplicate="skip")[0].id == "c"


def test_vectors_of_numpy_go_in_and_come_out(client: Any, user: str) -> None:
    vector = np.arange(1, DIM + 1, dtype=np.float32)
    client.add(user, [{"id": "a", "text": "A.", "vector": vector}])
    found = client.get(user, "a", include_vectors=True)
    assert found.vector.dtype == np.float32
    assert np.array_equal(found.vector, vector)
    assert found == client.get_many(user, ["a"], include_vectors=True).memories[0]
    assert found != client.get(user, "a")
    best = client.search(user, vector=vector, include_vectors=True)[0]
    assert (best.id, best.score) == ("a", 1.0)
    assert np.array_equal(best.vector, vector)


def test_search_sorts_by_score_and_filters(client: Any, user: str) -> None:
    client.add(user, [{"id": str(n), "text": f"Number {n}.", "metadata": {"n": n}} for n in range(20)])
    found = client.search(user, "Number 7.")
    assert len(found) == 10
    assert found[0].id == "7"
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert {one.id for one in client.search(user, "x", filter={"n": {"gte": 18}})} == {"18", "19"}
    assert client.search(user, "Number 7.", top_k=1, min_score=0.8)[0].id == "7"
    assert client.search("nobody", "x") == []


def test_search_explains_its_scores_and_brings_context(client: Any, user: str) -> None:
    moment = datetime(2026, 1, 2, tzinfo=UTC)
    texts = ["We were in Oslo.", "Then we took a train.", "It snowed in Bergen."]
    client.add(user, [{"text": text, "thread": "t", "happened_at": moment} for text in texts])
    found = client.search(user, "train", mode="words", explain=True, context=1, since=moment, top_k=1)
    assert {str(one) for one in found} == set(texts)
    (hit,) = (one for one in found if not one.context)
    assert (hit.text, hit.thread, hit.happened_at, hit.scores["words"]) == (texts[1], "t", moment, 1.0)
    assert client.search(user, "train", until=moment - timedelta(days=1)) == []


def test_list_goes_through_all_pages(client: Any, user: str) -> None:
    client.add(user, [{"id": str(n), "text": f"Number {n}.", "metadata": {"even": n % 2 == 0}} for n in range(7)])
    assert [one.id for one in client.list(user, order="created_at", limit=3)] == ["0", "1", "2", "3", "4", "5", "6"]
    assert [one.id for one in client.list(user, filter={"even": True})] == ["6", "4", "2", "0"]
    assert [*client.list("nobody")] == []


def test_get_many_and_delete_many_name_the_missing(client: Any, user: str) -> None:
    client.add(user, [{"id": "a", "text": "A."}, {"id": "b", "text": "B."}])
    got = client.get_many(user, ["b", "x", "a", "b"])
    assert ([one.id for one in got.memories], got.missing) == (["b", "a"], ["x"])
    deleted = client.delete_many(user, ["x", "a"])
    assert (deleted.deleted, deleted.missing) == (1, ["x"])


def test_more_ids_than_a_request_holds(client: Any, user: str) -> None:
    client.add(user, [{"id": str(n), "text": f"Number {n}."} for n in range(3)])
    ids = [str(n) for n in range(calls.MAX_IDS + 2)]
    got = client.get_many(user, [*ids[3:], *ids[:3], *ids])
    assert ([one.id for one in got.memories], got.missing) == (["0", "1", "2"], ids[3:])
    deleted = client.delete_many(user, ids)
    assert (deleted.deleted, deleted.missing) == (3, ids[3:])


def test_an_update_by_a_key_that_only_writes_has_no_content() -> None:
    at = "2026-01-01T00:00:00Z"
    steps = calls.Calls.update(None, "ann", "m", text="tea")
    next(steps)
    with pytest.raises(StopIteration) as done:
        steps.send({"id": "m", "user_id": "ann", "created_at": at, "updated_at": at, "version": 2})
    changed = done.value.value
    assert (changed.id, changed.version, changed.text, changed.metadata) == ("m", 2, "", {})


def test_update_changes_what_is_given(client: Any, user: str) -> None:
    client.add(user, [{"id": "a", "text": "Tea.", "metadata": {"n": 1}, "expires_at": "2099-01-01T00:00:00Z"}])
    changed = client.update(user, "a", text="Green tea.", metadata_merge={"m": 2})
    assert (changed.text, changed.metadata, changed.version) == ("Green tea.", {"n": 1, "m": 2}, 2)
    assert changed.expires_at == datetime(2099, 1, 1, tzinfo=UTC)
    assert client.update(user, "a", expires_at=None).expires_at is None
    with pytest.raises(memserve.Conflict) as caught:
        client.update(user, "a", text="Black tea.", if_version=1)
    assert caught.value.code == "version_mismatch"
    assert [(event.event, event.text) for event in client.history(user, "a", limit=1)] == [
        ("added", "Tea."),
        ("updated", "Green tea."),
        ("updated", "Green tea."),
    ]


def test_delete_and_delete_where(client: Any, user: str) -> None:
    client.add(user, [{"id": str(n), "text": f"Number {n}.", "metadata": {"n": n}} for n in range(4)])
    assert client.delete(user, "0") is None
    with pytest.raises(memserve.NotFound) as caught:
        client.delete(user, "0")
    assert (caught.value.status, str(caught.value)) == (404, "id: there is no memory '0'")
    assert client.delete_where(user, {"n": {"lt": 3}}) == 2
    assert [one.id for one in client.list(user)] == ["3"]


def test_users(client: Any, user: str) -> None:
    client.add_many([{"user_id": f"{user} {n}", "text": "Tea."} for n in range(3)])
    found = [*client.users(prefix=user, limit=2)]
    assert [(one.user_id, one.memories) for one in found] == [(f"{user} {n}", 1) for n in range(3)]
    one = client.user(f"{user} 0")
    assert (one.memories, one.version, one.bytes > 0) == (1, 1, True)
    erased = client.delete_user(f"{user} 0")
    assert (erased.deleted, client.user(f"{user} 0").memories) == (1, 0)


def test_add_many_answers_in_the_order_of_the_request(client: Any, user: str) -> None:
    users = [f"{user} {n % 2}" for n in range(5)]
    added = client.add_many([{"user_id": one, "text": f"Number {n}."} for n, one in enumerate(users)])
    assert [(one.user_id, one.version) for one in added] == [
        (users[0], 1),
        (users[1], 1),
        (users[0], 2),
        (users[1], 2),
        (users[0], 3),
    ]


def test_export_and_import(client: Any, user: str, tmp_path: Path) -> None:
    client.add(user, [{"id": "a", "text": "One\u2028line."}, {"id": "b", "text": "Another.", "metadata": {"n": 1}}])
    client.update(user, "a", metadata={"m": 2})
    lines = [*client.export(user)]
    assert [json.loads(line)["id"] for line in lines] == ["b", "a"]
    assert all(line.endswith(b"\n") for line in lines)
    file = tmp_path / "export.ndjson"
    file.write_bytes(b"".join(lines))
    for number, source in enumerate((file, str(file), lines, iter(lines), [json.loads(line) for line in lines])):
        other = f"{user} {number}"
        imported = client.import_(other, source)
        assert (imported.imported, imported.unchanged, imported.truncated) == (2, 0, 0)
        assert [*client.export(other)] == lines
        assert [one.text for one in client.history(other, "a")] == ["One\u2028line."] * 2
    assert client.import_(f"{user} 0", file).unchanged == 2
    assert [*client.export("nobody")] == []


def test_an_import_of_texts_is_embedded(client: Any, user: str) -> None:
    client.import_(user, [{"id": "a", "text": "Tea."}, '{"id": "b", "text": "Coffee."}'])
    assert client.search(user, "Coffee.")[0].id == "b"
    with pytest.raises(memserve.BadRequest) as caught:
        client.import_(user, ['{"id": "c"}\n{"id": "d"}'])
    assert (caught.value.param, str(caught.value)) == ("lines.0", "lines.0: must be one line")


def test_a_list_that_is_too_long_for_one_request_goes_in_pieces(
    client: Any, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_ITEMS", 10)
    monkeypatch.setattr(calls, "PIECE_ITEMS", 3)
    texts = [f"Number {n}." for n in range(20)]
    assert np.array_equal(client.embed(texts), vectors_of(texts))
    added = client.add(user, [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    assert [one.id for one in added] == [str(n) for n in range(20)]
    assert client.user(user).memories == 20
    with pytest.raises(memserve.BadRequest) as caught:
        client.add(user, [*texts[:16], "", *texts[17:]])
    assert (caught.value.param, str(caught.value)) == ("memories.16.text", "memories.16.text: must not be empty")


def test_pieces_of_a_thread_are_written_in_order(client: Any, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_BYTES", 100)
    monkeypatch.setattr(calls, "PIECE_BYTES", 100)
    memories = [{"user_id": user, "id": str(n), "text": f"Number {n}."} for n in range(20)]
    # Versions count the writes of a user: they follow the order of the pieces.
    monkeypatch.setattr(calls, "_order_counts", lambda items: True)
    assert [one.version for one in client.add_many(memories)] == [*range(1, 21)]


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda client, user: client.embed("one text"), "input"),
        (lambda client, user: client.embed([]), "input"),
        (lambda client, user: client.embed(["a", ""]), "input.1"),
        (lambda client, user: client.embed(["a"], dimensions=DIM + 1), "dimensions"),
        (lambda client, user: client.embed(["a"], colour="red"), "colour"),
        (lambda client, user: client.add(user, "one text"), "memories"),
        (lambda client, user: client.add(user, ["a", " "]), "memories.1.text"),
        (lambda client, user: client.add(user, [{"text": "a", "colour": "red"}]), "memories.0.colour"),
        (lambda client, user: client.add(user, ["a"], colour="red"), "colour"),
        (lambda client, user: client.add("", ["a"]), "user_id"),
        (lambda client, user: client.add(None, ["a"]), "user_id"),
        (lambda client, user: client.add_many([{"text": "a"}]), "memories.0.user_id"),
        (lambda client, user: client.search(user, "a", colour="red"), "colour"),
        (lambda client, user: client.search(user, "a", top_k=0), "top_k"),
        (lambda client, user: client.search(user, "a", filter={"n": {"near": 3}}), "filter.n.near"),
        (lambda client, user: client.get(user, ""), "memory_id"),
        (lambda client, user: [*client.list(user, limit=0)], "limit"),
        (lambda client, user: [*client.list(user, order="text")], "order"),
        (lambda client, user: [*client.list(user, colour="red")], "colour"),
        (lambda client, user: client.update(user, "a", colour="red"), "colour"),
        (lambda client, user: client.delete_where(user, {}), "filter"),
        (lambda client, user: client.get_many(user, "abc"), "ids"),
    ],
)
def test_an_invalid_argument_is_named(client: Any, user: str, call: Any, param: str) -> None:
    with pytest.raises(memserve.BadRequest) as caught:
        call(client, user)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).startswith(f"{param}: ")


def test_keys(client: Any, user: str) -> None:
    expires = datetime.now(UTC) + timedelta(days=1)
    made = client.create_key(user_id=user, scopes=["read"], label="A phone", expires_at=expires, requests_per_minute=9)
    assert made.key.startswith(f"ms_{made.id}")
    assert made.key not in repr(made)
    found = next(one for one in client.keys(limit=1) if one.id == made.id)
    assert (found.tenant, found.user_id, found.scopes, found.label) == ("default", user, ["read"], "A phone")
    assert (found.expires_at, found.requests_per_minute, found.revoked_at) == (expires, 9, None)
    assert client.revoke_key(made.id).revoked_at is not None
    with pytest.raises(memserve.NotFound):
        client.revoke_key("no-such-key")
    with pytest.raises(memserve.BadRequest) as caught:
        client.create_key(scopes=["everything"])
    assert caught.value.param == "scopes.0"


def test_ready_names_the_model(client: Any) -> None:
    ready = client.ready()
    assert (ready.model, ready.device) == ("fake", "cpu")


def test_ids_that_a_path_would_change(client: Any) -> None:
    user = "a/../b%2F?#;= é\u202f"
    client.add(user, [{"id": "x/..", "text": "Tea."}])
    assert client.get(user, "x/..").user_id == user
    with pytest.raises(memserve.NotFound):
        client.get("..", ".")
