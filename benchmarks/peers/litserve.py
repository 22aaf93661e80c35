"""LitServe with its batching.

    python -m benchmarks.peers.litserve --model FOLDER --port 8300

A request has one or more texts. LitServe batches requests, and `predict` embeds all texts of a batch in one call.
LitServe's own OpenAI route is not used: it requires a `model` field and serialises lists of numbers with pydantic.
"""

from itertools import accumulate, chain, pairwise

import litserve
import numpy as np
from starlette.responses import Response

from benchmarks.peers.arguments import parser
from benchmarks.peers.model import Encoder
from benchmarks.peers.wire import answer


class Embeddings(litserve.LitAPI):
    def __init__(self, model: str, dtype: str, threads: int, *, max_batch_size: int, batch_timeout_s: float) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout_s, api_path="/v1/embeddings")
        self._load = (model, dtype, threads)

    def setup(self, device: str) -> None:
        self.encode = Encoder(*self._load)

    def decode_request(self, request: dict) -> list[str]:
        given = request["input"]
        return [given] if isinstance(given, str) else given

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, x: list[list[str]]) -> list[np.ndarray]:
        vectors = self.encode(list(chain.from_iterable(x)))
        return [vectors[begin:end] for begin, end in pairwise(accumulate(map(len, x), initial=0))]

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> Response:
        return Response(answer(output), media_type="application/json")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--max-batch-size", type=int, default=32)
    arguments.add_argument("--batch-timeout-s", type=float, default=0.01)
    arguments.add_argument("--fast-queue", action="store_true")
    options = arguments.parse_args()
    api = Embeddings(
        options.model,
        options.dtype,
        options.threads,
        max_batch_size=options.max_batch_size,
        batch_timeout_s=options.batch_timeout_s,
    )
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=options.workers, timeout=False, fast_queue=options.fast_queue
    )
    server.run(host="127.0.0.1", port=options.port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
