"""All private or undocumented parts of Ray Serve that memserve depends on.

Each entry says what it is, why memserve needs it, and what breaks without it. All entries were checked with Ray 2.60.0.
tests/serving/test_ray_internals.py checks each of them against the installed Ray within milliseconds. A start with a
Ray of another series is refused (`wrong_ray`). To move to another Ray, run that test and tests/cluster with it, then
change `CHECKED_WITH`.

Importing this module imports neither Ray nor uvicorn: `memserve env` must answer at once.
"""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import HttpError
from deployments.requests.origin import HEADER
from store.errors import OUTCOME_UNKNOWN

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

CHECKED_WITH = "2.60.0"


def wrong_ray() -> str | None:
    """The reason, in one line, why the installed Ray cannot be used; None if it can be.

    Patch releases of the series that was checked are accepted.
    """
    try:
        installed = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed.split(".")[:2] == CHECKED_WITH.split(".")[:2]:
        return None
    return (
        f"memserve needs Ray {CHECKED_WITH}, and Ray {installed} is installed: "
        f'run pip install "ray[serve]~={CHECKED_WITH}" in this environment'
    )


# --- Lines of haproxy.cfg -------------------------------------------------------------------------------------------
#
# What: Ray renders haproxy.cfg from a template of its own and copies the values of some variables into it unchanged. A
#   value of several lines therefore adds directives. RETRY_ON and BALANCE_ALGORITHM (Ray puts RAY_SERVE_HAPROXY_ before
#   each name) are copied into the section `defaults`, HEALTH_CHECK_INTER into the backend of the gateways.
# Why: see each; tests/serving/test_haproxy.py runs HAProxy with these lines and without Ray.


def _lines(*lines: str) -> str:
    """The value of a variable that adds directives: the value that Ray asks for, then our lines."""
    return "\n    ".join(lines)


# Why: if a gateway dies, its unanswered requests are sent to another gateway, or kept until there is one. HAProxy
#   cannot know whether the request took effect. The id that HAProxy adds to each request lets the log recognise a write
#   that arrives twice (deployments/requests/origin.py).
# Without it: requests fail whenever a gateway dies. If only the id is missing, resent writes are stored twice;
#   /health/ready then answers 503 (`request_id_is_missing` in deployments/requests/origin.py).
_RETRY_ON = _lines(
    "conn-failure empty-response",
    # A request can be resent only if HAProxy holds all of it before the first attempt.
    "option http-buffer-request",
    # Choose another gateway at every second attempt, with a pause of a second before the attempts between. HAProxy does
    # not know at once that a gateway has died; without the pause all attempts would be over by then.
    "option redispatch 2",
    # Ray makes HAProxy log each request to syslog, which hardly any machine here has. Log failed requests only.
    "option dontlog-normal",
    # Ray's `option httplog` would log the URL, and with it a filter. The last word is our id of the request.
    'log-format "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %tsc %ac/%fc/%bc/%sc/%rc %sq/%bq %HM %ID"',
    "unique-id-format %[date(0,us)]-%[uuid]",
    f"unique-id-header {HEADER}",
    # The headers, and as much of the body as HAProxy holds, must arrive within this time. Without a limit a client that
    # sends nothing more would keep its connection for an hour.
    "timeout http-request 300s",
)

# Why: HAProxy answers some requests itself, and clients should find the same JSON in every error. Ray's template makes
#   502, 503 and 504 a 500 in plain text, and leaves HTML in the others. Ray's own lines stand above BALANCE_ALGORITHM,
#   and the last line for a status wins.
# Without it: clients get errors that they cannot parse, and no Retry-After.
# HAProxy 2.8 cannot change its answers to bytes that are not an HTTP request, nor to a request whose headers do not
#   arrive in time: they stay HTML (github.com/haproxy/haproxy/issues/3032; later versions use the line for 400).
_MAX_HEADER_BYTES = 65_536
_BUFFER_BYTES = 2 * _MAX_HEADER_BYTES  # HAProxy refuses headers that do not fit into a buffer before any rule is read


def _answer(status: int, kind: str, message: str, code: str, retry_after_s: float | None = None) -> str:
    """The arguments of a directive that answers with an error."""
    error = HttpError(status, kind, message, None, code, retry_after_s)
    retry = "" if retry_after_s is None else f" hdr retry-after {retry_after_s:.0f}"
    return f"status {status} content-type application/json string '{json.dumps(error.body())}'{retry}"


_ANSWERS = (
    _answer(400, "invalid_request_error", "The request is not valid HTTP.", "invalid_http"),
    _answer(408, "timeout_error", "The request did not arrive in time.", "request_timeout"),
    _answer(500, "server_error", "HAProxy failed on this request.", "internal_error"),
    _answer(501, "invalid_request_error", "HAProxy does not support this request.", "not_implemented"),
    _answer(502, "server_error", "No gateway answered. A write may have been made.", OUTCOME_UNKNOWN),
    _answer(503, "unavailable_error", "No gateway can be reached; try again later.", "unavailable", 1.0),
    _answer(504, "timeout_error", "No gateway answered in time. A write may be made.", OUTCOME_UNKNOWN),
)
_BALANCE_ALGORITHM = _lines("leastconn", *(f"http-error {answer}" for answer in _ANSWERS))

# Why: a gateway's event loop reads and answers 500 to 1,500 requests a second. If more arrive, each of them is answered
#   later than the one before, soon later than its client waits, and the work is wasted. Refusing a request costs
#   HAProxy 0.1 ms, and a gateway 0.5. A burst is admitted: HAProxy begins to refuse when there have been many requests
#   without a pause for a second, and stops when there have been few for as long. It is CoDel's idea (RFC 8289), with
#   requests in progress in place of waiting time. Callers that have few requests in progress are refused last. HAProxy
#   tells callers by their key, however its header is written, or by their address. Health checks are not refused when
#   there are many requests, and need no key, so each address may have only few of them in progress.
# Without it: more requests than the gateways can read make all answers late.
MANY_REQUESTS = 256
"""Requests in progress for each gateway beyond which HAProxy answers 429 while it refuses."""
FEW_REQUESTS = MANY_REQUESTS // 2
REFUSES_AFTER_MS = 1000
"""HAProxy refuses when there were at least `FEW_REQUESTS` at all times for so long, until there are fewer as long."""
MAX_REQUESTS = 2 * MANY_REQUESTS
"""Requests in progress for each gateway beyond which HAProxy answers 429 in any case."""
FEW_OF_A_CALLER = 16
"""A caller with at most this many requests in progress is refused only beyond `MAX_REQUESTS`. An address may have as
many health checks in progress."""

_OVERLOADED = _answer(429, "rate_limit_error", "Too many requests; try again later.", "overloaded", 1.0)
_HEADERS_TOO_LARGE = _answer(
    431, "invalid_request_error", f"The headers are larger than {_MAX_HEADER_BYTES} bytes.", "headers_too_large"
)
_HEALTH_CHECK_INTER = _lines(
    "5s",
    f"http-request return {_HEADERS_TOO_LARGE} if {{ req.hdrs_bin,length gt {_MAX_HEADER_BYTES} }}",
    "acl is_health path /health /health/live /health/ready /ping",
    "stick-table type string len 40 size 100k expire 10s store conn_cur",
    # The first line that applies counts.
    "http-request track-sc0 src,concat(-health) if is_health",
    "http-request track-sc0 req.fhdr(authorization),word(-1,' '),sha1,hex if { req.fhdr(authorization) -m found }",
    "http-request track-sc0 req.fhdr(x-api-key),word(-1,' '),sha1,hex if { req.fhdr(x-api-key) -m found }",
    "http-request track-sc0 src",
    "http-request set-var(txn.now) date(0,ms)",
    "http-request set-var(txn.gateways) nbsrv",
    "http-request set-var(txn.gateways) int(1) if { nbsrv eq 0 }",
    "http-request set-var(txn.in_progress) be_conn,div(txn.gateways)",
    f"acl are_few var(txn.in_progress) -m int lt {FEW_REQUESTS}",
    f"acl are_many var(txn.in_progress) -m int gt {MANY_REQUESTS}",
    f"acl are_too_many var(txn.in_progress) -m int gt {MAX_REQUESTS}",
    f"acl of_a_caller sc0_conn_cur gt {FEW_OF_A_CALLER}",
    "http-request set-var(proc.calm_at) var(txn.now) if are_few",
    "http-request set-var(proc.busy_at) var(txn.now) if !are_few",
    "http-request set-var(txn.busy_ms) var(txn.now),sub(proc.calm_at)",
    "http-request set-var(txn.calm_ms) var(txn.now),sub(proc.busy_at)",
    f"http-request set-var(proc.refuses) bool(true) if {{ var(txn.busy_ms) -m int gt {REFUSES_AFTER_MS} }}",
    f"http-request set-var(proc.refuses) bool(false) if {{ var(txn.calm_ms) -m int gt {REFUSES_AFTER_MS} }}",
    "acl refuses var(proc.refuses) -m bool",
    f"http-request return {_OVERLOADED} if is_health of_a_caller",
    f"http-request return {_OVERLOADED} if !is_health refuses are_many of_a_caller or !is_health are_too_many",
    "default-server inter 5s",
)

# --- RAY_SERVE_* variables ------------------------------------------------------------------------------------------
#
# What: Serve reads these variables when it is imported, in every process. They must be set wherever Ray is started;
#   `memserve serve` sets them itself, and `memserve env` prints them for other shells.
# Why and without it: see each.
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"

ENVIRONMENT = {
    # HAProxy in front of the gateways instead of Serve's proxy, which is written in Python: 3,500 requests/s of a
    # trivial route instead of 370, on two cores.
    _HAPROXY: "1",
    # User code runs on the replica's event loop, and calls between replicas go over gRPC: 1,085 requests/s of a route
    # with one handle call instead of 144. Code that blocks must therefore run in an executor.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A gateway that leaves waits this long for HAProxy to notice. HAProxy notices within 0.1 s and retries what the
    # gateway refuses; Serve would wait for 30 s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # A call between deployments may be as large as a request. The default, 4 MiB, is too small for a page of long
    # texts.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # By default Serve's controller wakes up ten times a second, which takes a twelfth of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # The gateways count requests by route and status. HAProxy would write a second line for each request, and an actor
    # of Serve would parse it.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_RETRY_ON": _RETRY_ON,
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": _BALANCE_ALGORITHM,
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": _HEALTH_CHECK_INTER,
    "RAY_SERVE_HAPROXY_RETRIES": "6",
    # Seconds after which HAProxy closes a connection whose client stops in the middle of its request, or does not read
    # its answer. By default an hour, for which such a request would count as one in progress.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "300",
    # Bytes, headers included, of the largest request that can be resent. The default is 16,384.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER_BYTES),
}
"""Variable -> value: what every process of a cluster that serves memserve must have in its environment."""

# HAProxy's own ports: variable -> Ray's default. They are open on all interfaces unless `local_variables` are set.
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_STATS_PORT": 8404, "RAY_SERVE_HAPROXY_METRICS_PORT": 9101}
_GRPC_OFFSET = 10_000


def gateway_port_variables(first: int, last: int) -> dict[str, str]:
    """Variables that keep Serve's ports within `first`..`last`, and those for gRPC 10,000 above.

    Gateways take ports from the beginning of the range; Serve's own proxy, HAProxy's fallback, gets the last one.
    Without these variables two servers on one machine share ports silently (SO_REUSEPORT), and one answers for the
    other.
    """
    variables = {}
    for protocol, offset in (("HTTP", 0), ("GRPC", _GRPC_OFFSET)):
        variables[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(first + offset)
        variables[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(last + offset)
        variables[f"RAY_SERVE_FALLBACK_PROXY_{protocol}_PORT"] = str(last + offset)
    return variables


# --- Nothing but the server's port can be reached from other machines -----------------------------------------------
#
# What: Ray has no setting for the address on which its processes listen; it follows from the node's address. That is
#   127.0.0.1 if RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is 0 (`get_node_ip_address` in ray/_private/services.py), which Ray
#   made for machines whose firewall asks about every port. GCS, raylet, object manager, agents, metrics exporters and
#   workers then listen on 127.0.0.1. `ray.init(_node_ip_address="127.0.0.1")` does not have this effect: Ray replaces
#   127.0.0.1 by the machine's other address (`resolve_ip_for_localhost`).
#   haproxy.cfg opens HAProxy's own ports on all interfaces (`bind :9101`, `bind *:8404` in haproxy_templates.py), and
#   Serve has one address for HAProxy and the gateways. RAY_SERVE_HAPROXY_BINARY_PATH names the program that Serve
#   starts as HAProxy: haproxy.sh, beside this file, changes haproxy.cfg and then becomes HAProxy.
# Why: `memserve serve` runs on one machine. Nothing but its own port is for others.
# Without it: other machines reach ports that ask for Ray's token or for nothing, and the gateways beside HAProxy.
# A program on the same machine that connects to this Ray needs the first variable as well: Ray would look for it at the
# machine's other address.
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
LOOPBACK = "127.0.0.1"


def local_variables(host: str, port: int, haproxy: str) -> dict[str, str]:
    """Variables for a server on one machine, of which other machines reach the address `host` and `port` at most.

    Args:
        haproxy: the path of HAProxy.
    """
    address = {"": "*", "0.0.0.0": "*", "::": "[::]"}.get(host, f"[{host}]" if ":" in host else host)
    return {
        **ON_LOOPBACK,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
        "SERVE_HAPROXY_BINARY": haproxy,
        "SERVE_HAPROXY_BIND": f"{address}:{port}",
    }


# What: a replica listens for the calls of other replicas on all interfaces, whatever the node's address is (`[::]:0` in
#   `_on_initialized`, ray/serve/_private/replica.py), by a function that its module has imported by name.
# Why: as above. The calls are pickled, so whoever makes one can run code; Ray's token alone stands before that.
# Without it: each replica has a port that other machines reach.
def listen_for_calls_on_loopback() -> None:
    """Make this replica listen for calls on 127.0.0.1 if its node has that address. Call it from the constructor."""
    from ray.serve._private import replica
    from ray.util import get_node_ip_address

    if get_node_ip_address() != LOOPBACK:
        return
    listen = replica.add_port_to_grpc_server

    def listen_on_loopback(server: Any, address: str) -> Any:
        return listen(server, address.replace("[::]", LOOPBACK))

    replica.add_port_to_grpc_server = listen_on_loopback


# What: Serve's controller knows the `http_options` that Serve was started with.
# Why: `serve deploy` and `serve run` take an address that memserve does not see before it runs.
# Without it: a server that asks for no key may listen where other machines reach it.
def http_host() -> str:
    """The address that Serve was told to listen on; empty if there is none. To be called in a replica."""
    import ray
    from ray.serve.context import _get_global_client

    return ray.get(_get_global_client()._controller.get_http_config.remote()).host or ""


def haproxy_is_in_front() -> bool:
    """Whether Serve was told, in this process's environment, to put HAProxy in front of the gateways."""
    return os.environ.get(_HAPROXY) == "1"


# --- Deploying a config file ----------------------------------------------------------------------------------------
#
# What: `deploy_apps` of Serve's private client takes a whole config file, as `serve deploy` does.
# Why: the public twins do not fit. `serve.run` takes an application but none of the options that a config file may set
#   for its deployments; the REST interface needs Ray's dashboard, which `memserve serve` does not start.
# Without it: `memserve serve` cannot start. `serve.start` before it is public.
def deploy(config: "ServeDeploySchema") -> None:
    """Hand a config file to the Serve that runs; returns before the application does. Raises Ray's own errors."""
    from ray.serve.context import _get_global_client

    _get_global_client().deploy_apps(config, _blocking=False)


# --- The HTTP protocol of a gateway ---------------------------------------------------------------------------------
#
# What: Serve starts uvicorn with `http="auto"`, and uvicorn looks that name up in a table of class paths.
# Why: deployments/serving/protocol.py says where the protocol of a gateway differs from uvicorn's.
# Without it: an answer that a dying gateway had begun is neither completed nor resent.
def use_http_protocol(path: str) -> None:
    """Make every uvicorn server that this process starts from now on use the class at `path` ("module:Class")."""
    import uvicorn.config

    uvicorn.config.HTTP_PROTOCOLS["auto"] = path


# What: Serve reads a request's body ahead, into memory and without a bound, to notice at once that its client has
#   disconnected, and then cancels the request. It calls the `receive` that uvicorn gives it, on the event loop of the
#   application, and passes the scope on with the keys that it does not know.
# Why: deployments/serving/protocol.py gives Serve a `receive` that tells of the disconnect alone, and the application
#   its own in the scope.
# Without it: the bodies of requests that wait take any amount of memory.
#
# What: this header makes Serve not watch for the disconnect of one request; its last occurrence counts.
# Why: an import notices the disconnect itself, between two pieces of its body.
# Without it: an import is cancelled in the middle of a piece.
DO_NOT_WATCH = (b"x-request-disconnect-disabled", b"?1")

# What: headers of a request by which its client tells Serve to end it after so many seconds, and not to watch for its
#   disconnect.
# Why: deployments/serving/protocol.py removes them from requests.
# Without it: a client gets a 408 in plain text, even for a write that is made, or work goes on that nobody waits for.
HEADERS_FOR_SERVE = (b"x-request-timeout-seconds", DO_NOT_WATCH[0])

# --- Routing by user ------------------------------------------------------------------------------------------------
#
# What: an experimental router, and the option `session_id` of a handle that it hashes. It ignores keyword arguments
#   that it does not know.
# Why: it keeps the searches of a user on the replica that holds the user's index in memory.
# Without it: answers stay correct, and each replica reads the indexes of all users.
CONSISTENT_HASH_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
CONSISTENT_HASH_OPTIONS = {"num_virtual_nodes": 100, "num_fallback_replicas": 2}

# --- Autoscaling of the whole application ---------------------------------------------------------------------------
#
# What: `autoscaling_policy` of an application in the config file, which Ray describes as under development, and the
#   attributes of the contexts that the policy is given.
# Why: most of a backlog waits in the gateways; a policy of the Embedder alone does not see it.
# Without it: embedders are added only when their own queues are full.
AUTOSCALING_CONTEXT = (
    "aggregated_metrics",
    "config",
    "current_num_replicas",
    "deployment_name",
    "target_num_replicas",
    "total_num_requests",
)


# --- What the autoscaling policies see ------------------------------------------------------------------------------
#
# What: two methods of Serve's controller that Ray made for its own tests. The caller must be connected to Ray.
# Why: benchmarks/scaling shows why replicas were added and removed. Ray exports these figures nowhere else.
# Without it: that benchmark cannot run. The server does not need it.
def requests_in_progress(app: str, deployment: str) -> float:
    """The requests of all replicas that are in progress or wait, averaged as the policies see them."""
    return float(_ask_controller("_get_total_num_requests_for_deployment_for_testing", app, deployment))


def newest_figure(app: str, deployment: str, name: str) -> float:
    """The sum, over the replicas, of the newest value that each has recorded under this name."""
    recorded = _ask_controller("_get_metrics_for_deployment_for_testing", app, deployment) or {}
    return float(sum(series[-1].value for series in recorded.get(name, []) if len(series)))


def _ask_controller(method: str, app: str, deployment: str) -> Any:
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client

    controller = _get_global_client()._controller
    return ray.get(getattr(controller, method).remote(DeploymentID(deployment, app)))


# --- The metrics of a node ------------------------------------------------------------------------------------------
#
# What: the keys NodeID, NodeManagerAddress and MetricsExportPort of `ray.nodes()`, and the path /metrics on that port.
# Why: Ray's agent collects the metrics of all processes of its node; `GET /metrics` passes on those of the application.
# Without it: `GET /metrics` answers 503.
def metrics_exporter() -> str:
    """The URL where the agent of this replica's node exports metrics. Raises LookupError if it exports none."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    for node in ray.nodes():
        if node["NodeID"] == own and node["MetricsExportPort"] > 0:
            host = node["NodeManagerAddress"]
            return f"http://{f'[{host}]' if ':' in host else host}:{node['MetricsExportPort']}/metrics"
    raise LookupError("its port is not known")


# --- Methods that Serve calls by name -------------------------------------------------------------------------------
#
# What: Serve looks for these methods on a deployment's class and calls those that it finds.
# Why: see each; without them nothing fails at first, and the effect is missing.
HOOKS = {
    "record_autoscaling_stats": "each second: figures for the autoscaling policies; without it nothing scales by work",
    "check_health": "each second: an error replaces the replica; without it a lost CUDA context stays in service",
    "reconfigure": "on each change of user_config; without it settings cannot change while the server runs",
    "__serve_build_asgi_app__": "once, after the constructor: the gateway's routes; without it there is no HTTP",
}
