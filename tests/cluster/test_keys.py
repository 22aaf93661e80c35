"""Keys behind HAProxy, with two gateways: two tenants, and a revocation that both gateways learn of."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import httpx
import openai
import pytest

import memserve
from deployments.calls.keys import FRESH_S
from tests.cluster.server import ROOT, Server
from tests.cluster.test_handle import _call, _connect

ARGS = {
    "log_level": "DEBUG",
    "model": {"provider": "fake"},
    "auth": {"mode": "keys"},
    "embedder": {"num_cpus": 0.2},
    "store": {"num_cpus": 0.2},
    "gateway": {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.2},
}


class Keyed:
    """A server that asks for keys, and the command that makes them."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def keys(self, *arguments: str) -> str:
        """What `memserve keys` prints, in the server's folder."""
        log = f"sqlite:///{self.server.folder}/data/memserve.db"
        command = [sys.executable, "-m", "memserve", "keys", arguments[0], "--log", log, *arguments[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def client(self, secret: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.server.url, timeout=60.0, trust_env=False, headers={"authorization": f"Bearer {secret}"}
        )


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    server = Server(tmp_path_factory.mktemp("keyed"), ARGS)
    server.start()
    yield Keyed(server)
    server.stop()


def test_two_tenants_have_memories_of_their_own(keyed: Keyed) -> None:
    with (
        keyed.client(keyed.keys("create", "--tenant", "one")) as one,
        keyed.client(keyed.keys("create", "--tenant", "other")) as other,
    ):
        for client, text in ((one, "Anna drinks tea."), (other, "Anna plays chess.")):
            assert client.post("/v1/users/anna/memories", json={"id": "m", "text": text}).status_code == 201
        for client, text in ((one, "Anna drinks tea."), (other, "Anna plays chess.")):
            assert client.get("/v1/users/anna/memories/m").json()["text"] == text
            assert client.post("/v1/embeddings", json={"input": text}).status_code == 200
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_connect, initargs=(keyed.server.ray_address(),)
    ) as driver:
        got = driver.submit(_call, "get", ("anna", "m"), {"tenant": "other"}).result(timeout=60)
        assert got["text"] == "Anna plays chess."
        assert driver.submit(_call, "users", (), {}).result(timeout=60)["users"] == []


def test_clients_send_the_key_as_they_send_that_of_another_server(keyed: Keyed) -> None:
    secret = keyed.keys("create", "--tenant", "clients", "--user", "anna")
    client = openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key=secret, max_retries=0)
    model = client.models.list().data[0].id
    assert len(client.embeddings.create(model=model, input=["tea", "chess"]).data) == 2
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{keyed.server.url}/v1", api_key="sk-none", max_retries=0).models.list()
    with memserve.Client(keyed.server.url, api_key=secret) as own:
        own.add("anna", ["Anna drinks tea."])
        assert [memory.text for memory in own.search("anna", "tea")] == ["Anna drinks tea."]
        with pytest.raises(memserve.NotFound):
            own.user("leo")


def test_a_request_without_a_key_is_refused_by_haproxy_and_by_no_way_around_it(keyed: Keyed) -> None:
    ports = {keyed.server.port, *_ports_of_gateways(keyed.server)}
    assert len(ports) == 3
    for port in ports:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/users", trust_env=False)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200


def test_a_revoked_key_is_refused_by_every_gateway_within_five_seconds(keyed: Keyed) -> None:
    secret = keyed.keys("create", "--tenant", "one")
    headers = {"x-api-key": secret}
    urls = [f"http://127.0.0.1:{port}/v1/models" for port in _ports_of_gateways(keyed.server)]
    with httpx.Client(trust_env=False, headers=headers) as client:
        assert [client.get(url).status_code for url in urls] == [200, 200]
        keyed.keys("revoke", secret.split("_")[1])
        revoked_at = time.monotonic()
        waiting = set(urls)
        while waiting:  # the keys are in use meanwhile
            waiting = {url for url in waiting if client.get(url).status_code == 200}
            assert time.monotonic() - revoked_at < FRESH_S
        assert [client.get(url).json()["error"]["code"] for url in urls] == ["invalid_key"] * 2


def test_the_gateways_share_the_limits_of_a_key(keyed: Keyed) -> None:
    """Together they admit what one bucket would, within a fifth: 60 requests, and one more each second."""
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "100000")
    secret = keyed.keys("create", "--tenant", "limited", "--scopes", "read,admin", *limits)
    urls = [f"http://127.0.0.1:{port}/v1/models" for port in _ports_of_gateways(keyed.server)]
    began_at = time.monotonic()
    with httpx.Client(trust_env=False, headers={"x-api-key": secret}) as client:
        answers = [client.get(urls[n % 2]) for n in range(150)]
    admitted = [answer.status_code for answer in answers].count(200)
    assert 48 <= admitted <= 1.2 * (60 + time.monotonic() - began_at)
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert (refused.headers["x-ratelimit-limit-requests"], refused.headers["x-ratelimit-remaining-tokens"]) == (
        "60",
        "100000",
    )


def test_the_audit_names_the_keys(keyed: Keyed) -> None:
    secret = keyed.keys("create", "--tenant", "audited", "--scopes", "read,write,admin")
    with keyed.client(secret) as client:
        assert client.post("/v1/users/anna/memories", json={"id": "m", "text": "Anna drinks tea."}).status_code == 201
        events = client.get("/v1/events").json()["events"]
    assert [(event["action"], event["key_id"], event["ids"]) for event in events] == [
        ("key.created", None, [secret.split("_")[1]]),
        ("memories.added", secret.split("_")[1], ["m"]),
    ]


def test_no_log_file_holds_a_text_or_a_key(keyed: Keyed) -> None:
    """At DEBUG. tests/api/test_planted.py plants values in requests to every route."""
    planted = "xPLANTEDx"
    secret = keyed.keys("create", "--tenant", "planted")
    memory = {"id": "m", "text": f"{planted} text", "metadata": {"key": planted}}
    with keyed.client(secret) as client:
        assert client.post("/v1/users/anna/memories", json=memory).status_code == 201
        search = {"query": planted, "filter": {"key": planted}}
        assert client.post("/v1/users/anna/memories/search", json=search).status_code == 200
        assert client.post("/v1/users/anna/memories", content=f'{{"text": "{planted}').status_code == 400
        assert client.get("/v1/users/anna/memories", params={"order": planted}).status_code == 400
        assert client.get("/v1/users/anna/memories", params={"filter": f'{{"key": "{planted}"}}'}).status_code == 200
    with keyed.client(f"{secret}{planted}") as stranger:
        assert stranger.get("/v1/users").status_code == 401
    files = keyed.server.log_files()
    tail = secret.split("_")[2].encode()
    assert [name for name, content in files.items() if planted.encode() in content or tail in content] == []
    assert any("replica_memserve_Gateway" in name for name in files)


def _ports_of_gateways(server: Server) -> list[int]:
    """The ports on which the gateways themselves listen."""
    gateways = server.replicas("Gateway")
    return sorted(
        {
            connection.laddr.port
            for process in server.descendants()
            if process.pid in gateways
            for connection in process.net_connections("tcp")
            if connection.status == "LISTEN" and 30_000 <= connection.laddr.port < 32_000
        }
    )
