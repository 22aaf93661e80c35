"""What a probe is answered, and that it starts nothing; in this process."""

from pathlib import Path

from tests.local_app import LocalApp

FAKE = {"status": "ready", "model": "fake", "device": "cpu", "dtype": "float32"}


async def test_ready_says_what_the_model_is(app: LocalApp) -> None:
    app.embedder.calls.clear()
    for path in ("/health/ready", "/health"):
        answer = await app.http.get(path)
        assert (answer.status_code, answer.json()) == (200, FAKE)
    assert app.embedder.calls == [("info", None)] * 2  # whether one is there is asked each time, what it is never again
    await app.http.post("/v1/embeddings", json={"input": "tea"})
    assert app.embedder.calls[2:] == [("embed", None)]


async def test_a_probe_starts_no_embedder_where_there_may_be_none(tmp_path: Path) -> None:
    app = await LocalApp.start(tmp_path, embedder={"min_replicas": 0})
    app.embedder.calls.clear()
    answer = await app.http.get("/health/ready")
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "ready", "model": "all-MiniLM-L6-v2", "device": "none yet", "dtype": "none yet"},
    )
    assert app.embedder.calls == []
    await app.http.post("/v1/embeddings", json={"input": "tea"})
    asked = list(app.embedder.calls)
    assert (await app.http.get("/health/ready")).json() == FAKE
    assert app.embedder.calls == asked
    await app.stop()
