"""`memserve serve`: its one line on success and on failure, its end, and the memories that outlive it."""

import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from store import Append, NewMemory, Store
from tests.cluster.elastic import Elastic
from tests.cluster.server import EXIT_WITHIN_S, Server, free_port

FAKE_ARGS: dict[str, Any] = {"model": {"provider": "fake", "name": "fake"}, "embedder": {"num_cpus": 0.1}}

Launch = Callable[..., Server]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Makes servers in this test's folder, and stops those that still run at its end."""
    servers: list[Server] = []

    def make(args: dict[str, Any], port: int | None = None) -> Server:
        servers.append(Server(tmp_path, args, port))
        return servers[-1]

    yield make
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            server.stop()


def refused(server: Server, within_s: float = 30.0) -> str:
    """Launch a server that cannot start, and return its one line. It exits with 1 in time and leaves no process."""
    server.launch()
    assert server.process is not None
    assert server.process.wait(timeout=within_s) == 1
    lines = server.all_lines()
    assert len(lines) == 1, lines
    assert server.leftovers() == []
    return lines[0]


def test_a_taken_port_is_reported_in_one_line(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        line = refused(launch(FAKE_ARGS, port))
    assert line.startswith(f"memserve: 127.0.0.1:{port} is taken")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": {"nmae": "x"}}, "model.nmae: unknown setting"),
        ({"embeder": {}}, "embeder: unknown setting"),
        (
            ["model"],
            "needs exactly one entry under `applications:`; its `args:` and the file's `http_options:` must be",
        ),
        ({"queue": {"max_batch_size": 0}}, "queue.max_batch_size: Input should be greater than or equal to 1"),
        ({"model": {"name": "/no/such/model"}}, "There is no model at '/no/such/model'"),
        ({"reranker": {"model": "/no/such/model"}}, "There is no model at '/no/such/model'"),
        ({"reranker": {"model": "nobody/none", "allow_download": False}}, "reranker.model: 'nobody/none' is not"),
        ({"store": {"url": "sqlite:////proc/no/memserve.db"}}, "store.url: cannot make /proc/no"),
    ],
)
def test_a_setting_error_is_reported_in_one_line(
    launch: Launch, tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    assert message in refused(launch(args))


def test_a_config_that_is_not_there_is_reported_in_one_line(launch: Launch, tmp_path: Path) -> None:
    server = launch(FAKE_ARGS)
    server.config.unlink()
    assert refused(server).endswith("serve_config.yaml: No such file or directory")


def test_a_folder_that_holds_no_model_is_reported_in_one_line(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    line = refused(launch({"model": {"name": str(tmp_path / "model")}}))
    assert line == f"memserve: model.name: the folder '{tmp_path}/model' has no model (no modules.json, no config.json)"


def test_a_hub_model_that_cannot_be_had_is_reported_in_one_line(launch: Launch, tmp_path: Path) -> None:
    line = refused(launch({"model": {"name": "nobody/no-such-model"}}))
    assert line.startswith("memserve: model.name: 'nobody/no-such-model' is not a folder, and no hub model")


def test_a_model_that_does_not_load_is_reported_in_one_line(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    line = refused(launch({"model": {"name": str(tmp_path / "model")}}), within_s=100)
    assert line.startswith(f"memserve: The model '{tmp_path}/model' cannot be loaded: ")


def test_everything_ends_with_the_server_and_the_memories_stay(launch: Launch, tmp_path: Path) -> None:
    """Whether it ends by Ctrl-C, by SIGTERM, or by kill -9 of the supervisor or of the server process."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None)
    for number, how in enumerate(ends):
        server = launch(FAKE_ARGS, free_port())
        line = server.start()
        assert line == f"memserve is ready: {server.url}  model fake on cpu (float32)  data {tmp_path}/data/memserve.db"
        assert "haproxy" in {name for name, _ in server.programs()}
        with server.client() as http:
            for n in range(5):
                text = f"kept {number}-{n}"
                assert http.post("/v1/users/u/memories", json={"text": text}).status_code == 201
            query = {"query": "kept 0-3", "top_k": 100}
            found = http.post("/v1/users/u/memories/search", json=query).json()["results"]
        kept = {f"kept {life}-{n}" for life in range(number + 1) for n in range(5)}
        assert {memory["text"] for memory in found} == kept
        assert found[0]["text"] == "kept 0-3"
        if how is not None:
            assert server.stop(how) == (0 if how != signal.SIGKILL else -signal.SIGKILL)
    # The server process itself dies by kill -9: the supervisor ends the rest.
    assert server.process is not None
    (inner,) = psutil.Process(server.process.pid).children()
    started = server.descendants()
    inner.kill()
    assert server.process.wait(timeout=EXIT_WITHIN_S) == 1
    assert not psutil.wait_procs(started, timeout=EXIT_WITHIN_S)[1]


def test_two_servers_on_one_machine_stay_apart(server: Server, elastic: Elastic) -> None:
    """Gateways share a taken port silently (SO_REUSEPORT), so each server must have its own block of ports."""
    servers: dict[str, Server] = {"one": server, "two": elastic}
    for n in range(10):
        for name, each in servers.items():
            with each.client() as http:
                assert http.post("/v1/users/apart/memories", json={"text": f"{name} {n}"}).status_code == 201
    for name, each in servers.items():
        with each.client() as http:
            query = {"query": "x", "top_k": 100}
            found = http.post("/v1/users/apart/memories/search", json=query).json()["results"]
        assert {memory["text"] for memory in found} == {f"{name} {n}" for n in range(10)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": "eighty"}, "http_options.port: 'eighty' is not a port"),
        ({"port": 70_000}, "http_options.port: 70000 is not a port"),
        ({"host": "256.0.0.1"}, "256.0.0.1:8000 cannot be listened on"),
    ],
)
def test_a_wrong_address_is_reported_in_one_line(launch: Launch, options: dict[str, Any], message: str) -> None:
    server = launch(FAKE_ARGS)
    config = yaml.safe_load(server.config.read_text())
    server.config.write_text(yaml.safe_dump({**config, "http_options": options}))
    assert message in refused(server)


def test_a_log_of_another_model_is_reported_in_one_line_with_what_to_do(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    store = Store.open(f"sqlite:///{tmp_path}/data/memserve.db", dim=32, model="another")
    store.append([Append("default", "u", (NewMemory("1", "text", np.ones(32, np.float32)),))])
    store.close()
    line = refused(launch(FAKE_ARGS), within_s=100)
    assert line.startswith("memserve: ")
    assert "another" in line
    assert "memserve log reembed" in line
