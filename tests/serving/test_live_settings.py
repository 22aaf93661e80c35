"""`user_config` changes settings while a replica runs; an invalid one changes nothing."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.__main__ import main
from deployments.serving.live_settings import LiveSettings
from deployments.settings import RELOADABLE, Settings, load, with_user_config
from tests.local_app import LocalApp


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    logger = logging.getLogger("memserve")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("deployment", "user_config", "reason"),
    [
        ("Embedder", {"queue": {"max_batch_tokns": 9}}, "queue.max_batch_tokns: not a setting that can change"),
        ("Embedder", {"queue": {"enabled": False}}, "queue.enabled: not a setting that can change"),
        ("Embedder", {"cache": {"max_bytes": 0}}, "cache.max_bytes: not a setting that can change"),
        ("Embedder", {"queue": 5}, "queue: not a setting that can change"),
        ("Embedder", {"queue": {"max_batch_tokens": 7}}, "queue.max_batch_tokens: Input should be greater than"),
        ("Gateway", {"log_level": "LOUD"}, "log_level: Input should be 'DEBUG'"),
        (
            "Store",
            {"store": {"index_budget_bytes": "much"}},
            "store.index_budget_bytes: Input should be a valid integer",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_its_path(deployment: str, user_config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="user_config of " + deployment) as refused:
        with_user_config(load({}), deployment, user_config)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_setting_that_user_config_leaves_out_keeps_the_value_of_args() -> None:
    settings = load({"queue": {"max_batch_tokens": 512, "batch_wait_s": 0.1}})
    changed = with_user_config(settings, "Embedder", {"queue": {"max_batch_tokens": 1024}})
    assert (changed.queue.max_batch_tokens, changed.queue.batch_wait_s) == (1024, 0.1)
    assert with_user_config(settings, "Embedder", {}) == with_user_config(settings, "Embedder", None) == settings


def test_every_reloadable_setting_exists() -> None:
    for path in set().union(*RELOADABLE.values()):
        model: Any = Settings
        for part in path.split("."):
            model = model.model_fields[part].annotation if hasattr(model, "model_fields") else None
        assert model is not None, path


def test_the_log_level_changes_and_comes_back() -> None:
    logger = logging.getLogger("memserve.embedding")
    settings = LiveSettings(load({"log_level": "WARNING"}), "Store")
    assert settings.take({"log_level": "DEBUG"})
    assert logger.getEffectiveLevel() == logging.DEBUG
    assert settings.take({"log_level": "ERROR"})
    assert logger.getEffectiveLevel() == logging.ERROR
    assert not settings.take({"log_level": "LOUD"})
    assert logger.getEffectiveLevel() == logging.ERROR
    assert settings.take({})
    assert logger.getEffectiveLevel() == logging.WARNING


async def test_a_gateway_applies_a_valid_user_config_and_refuses_an_invalid_one(
    app: LocalApp, caplog: pytest.LogCaptureFixture
) -> None:
    async def embedded_now() -> int:
        before = len(app.model.texts)
        answer = await app.http.post("/v1/embeddings", json={"input": "tea"})
        assert answer.status_code == 200
        return len(app.model.texts) - before

    assert [await embedded_now() for _ in range(2)] == [1, 0]
    await app.gateway.reconfigure({"cache": {"max_bytes": 0}, "gateway": {"max_body_bytes": 1024}})
    assert [await embedded_now() for _ in range(2)] == [1, 1]
    assert (await app.http.post("/v1/embeddings", content=b" " * 1025)).status_code == 413
    await app.gateway.reconfigure({"cache": {"max_byts": 1_000_000}})
    assert "user_config refused, the settings are unchanged: user_config of Gateway: cache.max_byts" in caplog.text
    assert [await embedded_now() for _ in range(2)] == [1, 1]
    await app.gateway.reconfigure({})
    assert [await embedded_now() for _ in range(2)] == [1, 0]
    assert (await app.http.post("/v1/embeddings", content=b" " * 1025)).status_code == 400


async def test_a_store_takes_another_budget(app: LocalApp) -> None:
    store = app.store.deployment

    def budget() -> int:
        return int(store._store.resident.budget_bytes)

    assert budget() == 1024**3
    await store.reconfigure({"store": {"index_budget_bytes": 1024**2}})
    assert budget() == 1024**2
    await store.reconfigure({"store": {"index_budget_bytes": 1024}})  # less than is allowed
    assert budget() == 1024**2
    await store.reconfigure({})
    assert budget() == 1024**3


@pytest.mark.parametrize(
    ("deployments", "status", "says"),
    [
        ([{"name": "Embedder", "user_config": {"queue": {"batch_wait_s": 0.01}}}, {"name": "Store"}], 0, " is valid\n"),
        ([{"name": "Embedder", "user_config": {"queue": {"batch_wait": 1}}}], 1, "Embedder: queue.batch_wait: not a "),
        ([{"name": "Embeder"}], 1, "deployments: 'Embeder' is not one of Embedder, Gateway, Reranker, Store\n"),
    ],
)
def test_a_config_file_is_checked_without_starting_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], deployments: list[dict[str, Any]], status: int, says: str
) -> None:
    path = tmp_path / "serve_config.yaml"
    args = {"model": {"provider": "fake"}}
    path.write_text(yaml.safe_dump({"applications": [{"args": args, "deployments": deployments}]}))
    assert main(["--check", str(path)]) == status
    said = capsys.readouterr()
    assert says in said.out + said.err
    assert str(path) in said.out + said.err
