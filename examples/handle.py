"""Call memserve from another program on the same Ray cluster, without HTTP.

The handle has the methods of the routes by the same names. Errors arrive as exceptions.

Start memserve with `make serve`, then run this in another terminal:

    .venv/bin/python examples/handle.py

It prints:

    (2, 384) float32
    added, added
    0.43  Leo practises Chopin.
    there is no memory 'no-such-id'
    2 memories erased
"""

import os
import sys
import uuid

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # `make serve` keeps Ray on 127.0.0.1; read when Ray is imported

import ray
from ray import serve

from store import NotFound

# "auto" finds the Ray that runs on this machine. Another cluster is named by host:port; the program then needs
# RAY_AUTH_MODE=token in its environment and that cluster's ~/.ray/auth_token.
ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "auto"

ray.init(address=ADDRESS, namespace="serve", log_to_driver=False, logging_level="ERROR")
memserve = serve.get_app_handle("memserve")

# `.remote()` returns at once; `.result()` waits. In async code, `await` the response instead.
vectors = memserve.embed.remote(["one text", "another"]).result()  # (n, dim) float32
print(vectors.shape, vectors.dtype)

user = f"dora-{uuid.uuid4()}"
added = memserve.add.remote(user, ["The optician opens at nine.", "Leo practises Chopin."]).result()
print(", ".join(memory["status"] for memory in added))

(best,) = memserve.search.remote(user, "playing the piano", mode="vector", top_k=1).result()
print(f"{best['score']:.2f}  {best['text']}")

# Errors are exceptions. Their classes are those of `store` and `deployments.errors`.
try:
    memserve.delete.remote(user, "no-such-id").result()
except NotFound:
    print("there is no memory 'no-such-id'")

erased = memserve.delete_user.remote(user).result()
print(f"{erased['deleted']} memories erased")
