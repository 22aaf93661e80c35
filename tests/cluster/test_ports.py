"""All ports that `memserve serve` opens are on a loopback address, except the server's own if it is open to others."""

import contextlib
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest
import yaml

from tests.cluster.elastic import Elastic
from tests.cluster.server import Server
from tests.cluster.test_launch import FAKE_ARGS


def listening(server: Server) -> dict[tuple[str, int], str]:
    """The addresses on which the processes of a server listen, each with the name of a process that does.

    TCP alone: HAProxy has a UDP socket too, from which it sends log lines; it reads nothing from it.
    """
    found = {}
    for process in server.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.ip, one.laddr.port] = process.name()
    return found


def is_loopback(host: str) -> bool:
    address = ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def open_to_others(server: Server) -> list[tuple[str, int]]:
    with server.client() as http:  # so that all replicas have had something to do
        assert http.post("/v1/users/ports/memories", json={"text": "tea"}).status_code == 201
        assert http.post("/v1/users/ports/memories/search", json={"query": "tea"}).status_code == 200
    found = listening(server)
    expected = {"haproxy", "gcs_server", "raylet", "ray::ServeReplica:memserve:Gateway", "ray::DashboardAgent"}
    assert expected <= set(found.values())
    return [address for address in found if not is_loopback(address[0])]


def test_nothing_listens_where_other_machines_reach_it(elastic: Elastic) -> None:
    assert open_to_others(elastic) == []


@pytest.fixture
def open_server(tmp_path: Path) -> Iterator[Server]:
    """A server that listens on all addresses."""
    server = Server(tmp_path, {**FAKE_ARGS, "auth": {"mode": "open"}})
    config = yaml.safe_load(server.config.read_text())
    config["http_options"]["host"] = "0.0.0.0"
    server.config.write_text(yaml.safe_dump(config))
    server.start()
    yield server
    server.stop()


def test_a_server_that_is_open_has_one_open_port(open_server: Server) -> None:
    assert open_to_others(open_server) == [("0.0.0.0", open_server.port)]
