"""What must stand in the environment wherever Ray is started: for Serve, and for HAProxy in front of the gateways.

A request that a gateway had in hand when it died is sent to another gateway, or kept until there is one. HAProxy cannot
know whether it was done, so each request carries an origin (deployments/requests/origin.py): the log makes a write
once, however often it arrives.
"""

from deployments.requests.origin import HEADER

CONTROLLER_CALLBACK = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
"""Serve does not start where its controller cannot import what this names."""

# Ray copies this value into HAProxy's `defaults` as it stands: the first line is its own, the others are ours.
_RETRY_ON = "\n    ".join(
    (
        "conn-failure empty-response",
        # A request can be sent again that is whole in HAProxy's buffer before it leaves.
        "option http-buffer-request",
        # At every second try another gateway, and a second's pause before the tries between: one that has just died
        # is not known to be dead yet, and without a pause all tries would be over by then.
        "option redispatch 2",
        # Ray has it write a line for each request to a syslog that hardly anybody has: of those that failed.
        "option dontlog-normal",
        "unique-id-format %[date(0,us)]-%[uuid]",
        f"unique-id-header {HEADER}",
    )
)

ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # HAProxy learns of a leaving gateway within 0.1 s and retries what it refuses; Serve would wait for 30 s.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # A call between deployments carries what a request may: of 4 MiB, the default, a page of long texts is more.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    CONTROLLER_CALLBACK: "deployments.serving.controller:check_user_configs",
    # Serve's controller looks ten times a second by itself, for a twelfth of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # Gateways count requests themselves, by route and status; HAProxy would write a second line for each, and an actor
    # of Serve's would parse it.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_RETRY_ON": _RETRY_ON,
    "RAY_SERVE_HAPROXY_RETRIES": "6",
    # Requests of up to so many bytes, headers included, can be sent again.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
}
"""Name -> value."""
