"""Which addresses other machines may reach."""

import socket
from ipaddress import ip_address


def is_reachable(host: str) -> bool:
    """Whether a host has an address that is not a loopback address. An empty host has all addresses."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # it is no address and no known name: `make_plan` says so
        return False
    return not all(ip_address(address[0]).is_loopback for *_, address in found)


def refusal(host: str) -> str:
    """Why a server that asks for no key does not listen on an address that other machines reach, in one line."""
    return (
        f"http_options.host: other machines may reach {host!r}, and memserve asks nobody for a key. Set "
        "auth.mode: keys, or listen on 127.0.0.1; or set auth.mode: open if only a server that authenticates its "
        "callers reaches the port"
    )
