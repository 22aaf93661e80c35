"""Fuzz the routes with schemathesis: `python -m tests.fuzz`, in about two minutes.

All of schemathesis's checks are on. It makes requests from the OpenAPI document, valid ones and others, and sequences
of them, to a server with a fake model and a real store. The server asks for keys; it is fuzzed with a key, without one,
and with an unknown one. Exit status 1 if a check fails, or if fewer requests were made than asked for.

What the document cannot say is said here: see EXPECTED.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.server import FuzzedServer, serving

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
UNKNOWN_KEY = f"ms_0123456789abcdef_{64 * 'a'}"
LEAST_CASES = 2_000  # with a key, without one, and with an unknown one each

EXPECTED = """
# The header x-request-timeout-ms asks for a 504 after its milliseconds.
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]

# A probe of readiness with such a header finds that nothing answers in time.
[[operations]]
include-path = ["/ping", "/health", "/health/ready"]
[operations.checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]

# Bodies and queries that are as described may still be refused: by the grammar of filters, cursors that the server did
# not make, dimensions, prompts and token ids that the model does not have, times in the past, fields that exclude each
# other, and integers that are written as 1.0. All other operations must accept what is as described.
[[operations]]
include-name = [
    "POST /v1/embeddings",
    "POST /",
    "POST /embed",
    "POST /similarity",
    "POST /decode",
    "POST /v1/users/{user_id}/memories",
    "POST /v1/memories",
    "POST /v1/users/{user_id}/memories/search",
    "POST /v1/users/{user_id}/memories/duplicates",
    "GET /v1/users/{user_id}/memories",
    "DELETE /v1/users/{user_id}/memories",
    "PATCH /v1/users/{user_id}/memories/{memory_id}",
    "GET /v1/users/{user_id}/memories/{memory_id}/history",
    "GET /v1/users",
    "POST /v1/users/{user_id}/import",
    "POST /v1/keys",
    "GET /v1/keys",
    "GET /v1/events",
    "POST /v1/rerank",
    "POST /v2/rerank",
]
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 401, 403, 404, 409, 504]

# The key with which the server is fuzzed is in the list of keys, from which a sequence would revoke it.
[[operations]]
include-name = "DELETE /v1/keys/{key_id}"
[operations.phases.stateful]
enabled = false
"""


def fuzz(server: FuzzedServer, key: str | None, *, examples: int, seed: int, phases: str) -> tuple[int, int]:
    """Fuzz a server. Returns schemathesis's exit status and the number of requests that it made."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "schemathesis.toml"
        auth = "" if key is None else f'[auth.openapi.bearer]\nbearer = "{key}"\n'
        config.write_text(f'hooks = "{HERE / "hooks.py"}"\n[cache]\nenabled = false\n{auth}{EXPECTED}')
        command = [Path(sys.executable).with_name("schemathesis"), f"--config-file={config}", "run", "--no-color"]
        command += [f"--seed={seed}", f"--max-examples={examples}", f"--phases={phases}", "--checks=all"]
        command += ["--warnings=off", "--suppress-health-check=all", f"{server.url}/openapi.json"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    generated = re.search(r"([\d,]+) generated", done.stdout)
    cases = int(generated[1].replace(",", "")) if generated else 0
    if done.returncode:
        print(done.stdout)
    return done.returncode, cases


def main(argv: list[str]) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the routes with schemathesis.")
    parser.add_argument("--examples", type=int, default=15, help="requests for each operation and phase, at most")
    parser.add_argument("--seed", type=int, default=1, help="another one makes other requests")
    options = parser.parse_args(argv)
    status = 0
    with serving("keys") as server:
        everything = "examples,coverage,fuzzing,stateful"
        for name, key, phases in (
            ("with a key", server.key, everything),
            ("without a key", None, "coverage,fuzzing"),
            ("with an unknown key", UNKNOWN_KEY, "coverage,fuzzing"),
        ):
            failed, cases = fuzz(server, key, examples=options.examples, seed=options.seed, phases=phases)
            print(f"{cases} requests {name}: {'failed' if failed else 'passed'}", flush=True)
            status |= int(failed != 0 or cases < LEAST_CASES)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
