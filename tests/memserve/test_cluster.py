"""The client over a Ray handle, without a cluster: its errors. tests/cluster/test_client.py has the calls."""

from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException

import memserve
from deployments.serving import handles
from memserve.cluster import HandleTransport


@pytest.mark.parametrize("client", [memserve.Client, memserve.AsyncClient])
def test_no_cluster_and_no_application_are_told_apart(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(handles.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(handles.ray, "init", init)
    with pytest.raises(memserve.NotReached, match="Could not find any running Ray"):
        client.in_cluster()

    def get_app_handle(app: str) -> None:
        raise RayServeException(app)

    monkeypatch.setattr(handles.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(handles.serve, "get_app_handle", get_app_handle)
    with pytest.raises(memserve.Unavailable, match="The application 'memserve' does not run on this cluster"):
        client.in_cluster()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RayActorError(), memserve.Unavailable),
        (RayServeException("no replica"), memserve.Unavailable),
        (TimeoutError(), memserve.TimedOut),
    ],
)
def test_errors_of_ray_become_errors_of_the_client(raised: Exception, expected: type[Exception]) -> None:
    class Lost:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *_: Any, **__: Any) -> Any:
            raise raised

    with pytest.raises(expected):
        memserve.Client.over(HandleTransport(Lost()), timeout=0.05).user("anna")


def test_calls_are_made_for_the_tenant_of_the_client() -> None:
    made: list[dict[str, Any]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *_: Any, **options: Any) -> Any:
            made.append(options)
            return self

        def result(self, timeout_s: float) -> dict[str, Any]:
            return {"user_id": "anna", "memories": 0, "version": 0, "bytes": 0}

    memserve.Client.over(HandleTransport(Recorder(), "acme")).user("anna")
    memserve.Client.over(HandleTransport(Recorder())).user("anna")
    assert made == [{"tenant": "acme"}, {}]
