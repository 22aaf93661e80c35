"""`user_config` under load: a valid one takes effect at once in the same processes, an invalid one changes nothing."""

import functools
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.elastic import DEPLOYMENTS, Elastic, Load, until

BATCH_WAIT_S = 0.5


@pytest.fixture(autouse=True)
def as_before(elastic: Elastic) -> Iterator[None]:
    """Restore the config that the test found."""
    yield
    elastic.deploy()
    elastic.settle()


def log_says(elastic: Elastic, deployment: str, reason: str) -> bool:
    return f"user_config refused, the settings are unchanged: {reason}" in elastic.log_of(deployment)


def embeds_in_s(http: httpx.Client) -> float:
    """The time for one text. It is at least the batch wait if the text begins a batch, and less if it joins one."""
    started = time.monotonic()
    assert http.post("/v1/embeddings", json={"input": f"a text at {started}"}).status_code == 200
    return time.monotonic() - started


def test_settings_change_under_load_without_a_restart(elastic: Elastic) -> None:
    def refuses(http: httpx.Client, size: int) -> bool:
        return http.post("/v1/embeddings", content=b" " * size).status_code == 413

    before = {name: elastic.replicas(name) for name in DEPLOYMENTS}
    right = {
        "Gateway": {
            "cache": {"max_bytes": 1_000_000},
            "gateway": {"max_body_bytes": 2048, "embed_calls_in_flight": 3, "embed_call_tokens": 64},
        },
        "Embedder": {
            "log_level": "INFO",
            "queue": {
                "max_batch_tokens": 64,
                "forwards_in_flight": 2,
                "batch_wait_s": BATCH_WAIT_S,
                "max_batch_size": 8,
            },
        },
        "Store": {"log_level": "INFO", "store": {"index_budget_bytes": 1 << 24}},
    }
    with elastic.client() as http, Load(elastic, "live") as load:
        assert not refuses(http, 2049)
        elastic.deploy(user_configs=right)
        until(lambda: refuses(http, 2049), 20.0)
        until(lambda: embeds_in_s(http) > BATCH_WAIT_S, 20.0)

        # An invalid one: its deployment keeps all settings and logs the reason; nothing restarts, nothing fails.
        for name, user_config, reason in (
            ("Gateway", {"gateway": {"max_body_bites": 4096}}, "gateway.max_body_bites: not a setting that can change"),
            ("Embedder", {"queue": {"enabled": False}}, "queue.enabled: not a setting that can change"),
            ("Store", {"store": {"index_budget_bytes": 5}}, "store.index_budget_bytes: Input should be greater than"),
        ):
            elastic.deploy(user_configs={**right, name: {**right[name], **user_config}})
            until(functools.partial(log_says, elastic, name, f"user_config of {name}: {reason}"), 20.0)
            elastic.settle()
        assert refuses(http, 2049) and not refuses(http, 2048)
        until(lambda: embeds_in_s(http) > BATCH_WAIT_S, 20.0)
        answered = load.answers
        until(lambda: load.answers > answered + 20, 30.0)

        # A valid one is applied even if another deployment's is invalid.
        elastic.deploy(user_configs={**right, "Gateway": {"gateway": {"max_body_bytes": 4096}}, "Store": {"queue": 5}})
        until(lambda: not refuses(http, 2049) and refuses(http, 4097), 20.0)
        until(functools.partial(log_says, elastic, "Store", "user_config of Store: queue: not a setting"), 20.0)

        elastic.deploy()
        until(lambda: not refuses(http, 2049), 20.0)
        until(lambda: max(embeds_in_s(http) for _ in range(10)) < BATCH_WAIT_S / 2, 30.0)
    assert load.failures == []
    elastic.settle()
    assert {name: elastic.replicas(name) for name in DEPLOYMENTS} == before
