"""How many embedders and stores the work needs: a table of cases, and the decisions of Serve's policies."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle  # noqa: TID251 - Serve pickles policies with it

from deployments.serving import autoscaling
from deployments.serving.autoscaling import (
    BusyTime,
    EmbedderLoad,
    EmbedderPolicy,
    StorePolicy,
    application_policy,
    embedders_needed,
)

TARGETS = {"target_drain_s": 1.0, "target_busy": 0.5}


def loads(*busy: float, rate: float = 1000.0) -> list[EmbedderLoad]:
    return [EmbedderLoad(rate, share) for share in busy]


@pytest.mark.parametrize(
    ("case", "waiting", "reported", "running", "needed"),
    [
        ("idle", 0, loads(0.0), 1, 0),
        ("a little to do", 0, loads(0.01), 1, 1),
        ("below the target", 0, loads(0.49), 1, 1),
        ("above the target", 0, loads(0.51), 1, 2),
        ("at work all the time, nothing waits", 0, loads(1.0), 1, 2),
        ("two at work all the time", 0, loads(1.0, 1.0), 2, 4),
        ("less than the target waits", 900, loads(0.4), 1, 1),
        ("a backlog of three seconds", 3000, loads(0.4), 1, 3),
        ("a backlog of three seconds of each", 6000, loads(0.4, 0.4), 2, 6),
        ("the backlog says more than use", 3000, loads(1.0), 1, 3),
        ("use says more than the backlog", 1000, loads(1.0), 1, 2),
        ("not measured yet, something waits", 9000, [], 1, 1),
        ("not measured yet, nothing waits", 0, [], 1, 0),
        ("one of two not measured yet", 4000, loads(1.0), 2, 4),
        ("no forward yet", 9000, loads(0.0, rate=0.0), 1, 1),
        ("none runs, nothing waits", 0, [], 0, 0),
        ("none runs, something waits", 9000, [], 0, 1),
        ("two are enough for two", 0, loads(0.4, 0.4), 2, 2),
        ("one would be too busy alone", 0, loads(0.22, 0.22), 2, 2),
        ("one would do", 0, loads(0.2, 0.19), 2, 1),
        ("three idle", 0, loads(0.0, 0.0, 0.0), 3, 0),
    ],
)
def test_the_table(case: str, waiting: float, reported: list[EmbedderLoad], running: int, needed: int) -> None:
    assert embedders_needed(waiting, reported, running, running, **TARGETS) == needed, case


def test_a_start_is_not_cancelled_by_a_slightly_smaller_load() -> None:
    assert embedders_needed(0, loads(0.51), 1, 1, **TARGETS) == 2
    assert embedders_needed(0, loads(0.45), 1, 2, **TARGETS) == 2
    assert embedders_needed(0, loads(0.35), 1, 2, **TARGETS) == 1


def test_a_load_that_wavers_around_a_threshold_changes_nothing() -> None:
    running, changes = 1, 0
    for busy in [0.49, 0.52, 0.46, 0.51, 0.43, 0.5, 0.45, 0.41] * 10:
        needed = embedders_needed(0, loads(*[busy / running] * running), running, running, **TARGETS)
        changes += needed != running
        running = needed
    assert (running, changes) == (2, 1)


def context(name: str, metrics: dict[str, dict[str, float]], running: int, **more: Any) -> Any:
    return SimpleNamespace(
        deployment_name=name,
        aggregated_metrics=metrics,
        current_num_replicas=running,
        target_num_replicas=max(1, running),
        **more,
    )


EMBEDDER = {
    "waiting_tokens": {"e1": 500.0, "e2": 100.0},
    "drain_tokens_per_s": {"e1": 900.0, "e2": 1100.0},
    "busy_share": {"e1": 0.5, "e2": 0.4},
}


def test_the_policy_of_the_embedder_sees_its_own_queue() -> None:
    policy = EmbedderPolicy(**TARGETS)
    assert policy(context("Embedder", EMBEDDER, 2)) == (2, {})
    assert policy(context("Embedder", {}, 0)) == (0, {})
    assert policy(context("Embedder", {}, 1)) == (0, {})


def test_the_policy_of_the_application_adds_the_queues_of_the_gateways() -> None:
    config = SimpleNamespace(policy=SimpleNamespace(policy_kwargs=TARGETS))
    requests = SimpleNamespace(get_target_ongoing_requests=lambda: 4.0, policy=SimpleNamespace(policy_kwargs={}))
    contexts = {
        1: context("Embedder", EMBEDDER, 2, config=config),
        2: context(
            "Gateway", {"waiting_tokens": {"g1": 3000.0, "g2": 1000.0}}, 2, total_num_requests=9, config=requests
        ),
        3: context("Store", {"busy_share": {"s1": 0.9, "s2": 0.3}}, 2, config=config),
    }
    assert application_policy(contexts) == ({1: 5, 2: 2.25, 3: 3}, {})
    # No embedder runs, and gateways that died do not report: the tokens that wait start one.
    contexts[1] = context("Embedder", {}, 0, config=config)
    assert application_policy(contexts)[0][1] == 1
    contexts[2] = context("Gateway", {}, 0, total_num_requests=0, config=requests)
    assert application_policy(contexts)[0] == {1: 0, 2: 1, 3: 3}
    # A reranker scales by its own tokens alone.
    contexts[4] = context("Reranker", {}, 0, config=config)
    contexts[2] = context("Gateway", {"waiting_tokens": {"g1": 900.0}}, 1, total_num_requests=4, config=requests)
    assert application_policy(contexts)[0] == {1: 1, 2: 1, 3: 3, 4: 0}
    queues = {"waiting_tokens": {"g1": 900.0}, "waiting_for_reranker_tokens": {"g1": 70.0}}
    contexts[2] = context("Gateway", queues, 1, total_num_requests=4, config=requests)
    assert application_policy(contexts)[0] == {1: 1, 2: 1, 3: 3, 4: 1}
    contexts[4] = context("Reranker", {"drain_tokens_per_s": {"r1": 20.0}, "busy_share": {"r1": 1.0}}, 1, config=config)
    assert application_policy(contexts)[0] == {1: 1, 2: 1, 3: 3, 4: 4}
    del contexts[4]
    # A deployment whose `autoscaling_config` in the config file names no policy.
    contexts[3] = context("Store", {"busy_share": {"s1": 0.9}}, 1, total_num_requests=6, config=requests)
    contexts[1] = context("Embedder", EMBEDDER, 2, total_num_requests=12, config=requests)
    assert application_policy(contexts)[0] == {1: 3, 2: 1, 3: 1.5}


@pytest.mark.parametrize(
    ("busy", "running", "needed"),
    [((), 1, 0), ((0.0,), 1, 0), ((0.49,), 1, 1), ((0.51,), 1, 2), ((0.22, 0.22), 2, 2), ((0.2, 0.19), 2, 1)],
)
def test_stores_follow_their_use(busy: tuple[float, ...], running: int, needed: int) -> None:
    reported = {"busy_share": {f"s{n}": share for n, share in enumerate(busy)}}
    assert StorePolicy(target_busy=0.5)(context("Store", reported, running)) == (needed, {})


def test_the_policies_run_in_a_controller_without_memserve() -> None:
    cloudpickle.register_pickle_by_value(autoscaling)
    try:
        carried = cloudpickle.dumps((EmbedderPolicy, application_policy))
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling)
    assert b"deployments.settings" not in carried
    policy, _ = cloudpickle.loads(carried)
    assert policy(**TARGETS)(context("Embedder", EMBEDDER, 2)) == (2, {})


def test_calls_that_overlap_count_once_as_busy_time() -> None:
    now = 0.0
    busy = BusyTime(clock=lambda: now)
    first, second = busy.call(), busy.call()
    now = 1.0
    with first:
        now = 2.0
        with second:
            now = 4.0
            assert busy.share() == 0.75
            now = 5.0
        now = 6.0
    now = 8.0
    assert busy.share() == 0.5
    assert busy.share() == 0.0
    now = 9.0
    assert busy.share() == 0.0
