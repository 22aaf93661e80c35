"""The calls of `memserve.Client` over a Ray handle, as programs on the cluster make them, and over HTTP, as others do.

The suite is that of all transports (tests/memserve/test_calls.py). It is run by a process of its own, as Serve's router
threads outlive `ray.shutdown`.
"""

import os
import subprocess
import sys

from tests.cluster.elastic import ARGS, Elastic
from tests.cluster.server import ROOT


def test_every_call_over_a_handle_and_over_http(elastic: Elastic) -> None:
    variables = {
        "RAY_ADDRESS": elastic.ray_address(),
        "TEST_LIVE_URL": elastic.url,
        "TEST_LIVE_DIM": str(ARGS["model"]["dim"]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/memserve/test_calls.py"]
    command += ["-k", "not rerank"]  # this server has no reranker
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
