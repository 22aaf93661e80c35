"""`user_config` under load: what is right is in force at once in the same processes, what is wrong changes nothing."""

import functools
from collections.abc import Iterator

import httpx
import pytest

from tests.cluster.elastic import DEPLOYMENTS, Elastic, Load, until


@pytest.fixture(autouse=True)
def as_before(elastic: Elastic) -> Iterator[None]:
    yield
    elastic.deploy()
    elastic.settle()


def has_logged(elastic: Elastic, deployment: str, text: str) -> bool:
    return text in elastic.log(deployment)


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
            "queue": {"max_batch_tokens": 64, "forwards_in_flight": 2, "batch_wait_s": 0.001, "max_batch_size": 8},
        },
        "Store": {"log_level": "INFO", "store": {"index_budget_bytes": 1 << 24}},
    }
    with elastic.client() as http, Load(elastic, "live") as load:
        assert not refuses(http, 2049)
        elastic.deploy(user_configs=right)
        until(lambda: refuses(http, 2049), 20.0)

        # A wrong one: as it was, and the log says why. (Serve writes the lines before an error out with it.)
        deployed = {name: elastic.log(name) for name in DEPLOYMENTS}
        wrong = {
            "Gateway": {"gateway": {"max_body_bites": 4096}},
            "Embedder": {"queue": {"enabled": False}},
            "Store": {"store": {"index_budget_bytes": 5}},
        }
        elastic.deploy(user_configs=wrong)
        for name, setting in {
            "Gateway": "gateway.max_body_bites: not a setting that it can change",
            "Embedder": "queue.enabled: not a setting that it can change",
            "Store": "store.index_budget_bytes: Input should be greater than",
        }.items():
            says = f"refused, the settings stay as they are: user_config of {name}: {setting}"
            assert says not in deployed[name]
            until(functools.partial(has_logged, elastic, name, says), 20.0)
        assert has_logged(elastic, "Embedder", "'max_batch_tokens': 64")
        assert has_logged(elastic, "Store", "'index_budget_bytes': 16777216")
        assert refuses(http, 2049) and not refuses(http, 2048)
        answered = load.answers
        until(lambda: load.answers > answered + 20, 30.0)

        elastic.deploy()
        until(lambda: not refuses(http, 2049), 20.0)
    assert load.failures == []
    elastic.settle()
    assert {name: elastic.replicas(name) for name in DEPLOYMENTS} == before
