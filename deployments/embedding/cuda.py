"""Unpadded forwards on one CUDA device.

Each forward thread has a stream, pinned staging memory and graphs of its own: while one batch computes, the other's
token ids go in and its vectors come out. A small batch replays a CUDA graph of the next larger shape, one launch in
place of hundreds; a large one, which keeps the card busy by itself, runs in its exact shape.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deployments.embedding import unpadded
from deployments.embedding.unpadded import Flat, Layout

logger = logging.getLogger(__name__)

# Shapes of the graphs, in tokens; beyond the last a forward is no longer bound by its launches.
GRAPH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def graph_texts(tokens: int) -> int:
    """Texts that a graph of so many tokens has room for: enough for texts of four tokens, and filler."""
    return tokens // 4 + 4


class Gpu:
    """Runs batches on one device; any number of threads may call it.

    Args:
        vectors: the model: features -> (texts, dim), on the device.
        device: a CUDA device.
        dim: length of a vector.
    """

    def __init__(self, vectors: Callable[[dict[str, Any]], torch.Tensor], device: torch.device, dim: int) -> None:
        self._vectors = vectors
        self._device = device
        self._dim = dim
        self._local = threading.local()
        self._capturing = threading.Lock()
        torch.cuda.synchronize(device)  # the weights came in on another stream

    def run(self, flat: Flat) -> np.ndarray:
        """Run one batch. Returns (texts, dim) float32 in the caller's order.

        Raises:
            torch.OutOfMemoryError: the batch does not fit; what it held is given back first.
        """
        worker = self._worker()
        try:
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(worker.stream):
                for graph in worker.graphs:
                    if unpadded.room(flat, graph.tokens, graph.texts, graph.longest):
                        bounded = unpadded.fill(flat, graph.tokens, graph.texts, graph.longest)
                        return worker.read(graph.replay(worker.stage(bounded)))[bounded.place]
                return worker.read(self._vectors(_features(worker.stage(flat), flat)))[flat.place]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise

    def capture(self, longest: int, first_position: int, max_batch_tokens: int) -> None:
        """Make this thread's graphs, largest first so that they share its memory.

        Args:
            longest: tokens of the longest text that the model reads.
            first_position: what the model calls the position of a text's first token.
            max_batch_tokens: no graph is larger than the smallest that holds it.
        """
        worker = self._worker()
        sizes = [tokens for tokens in GRAPH_TOKENS if tokens < 2 * max_batch_tokens]
        # A capture watches the whole device: one at a time, and no other thread may allocate meanwhile.
        with self._capturing, torch.inference_mode(), torch.cuda.device(self._device):
            for tokens in reversed(sizes):
                one = Flat(
                    np.zeros(1, np.int64),
                    np.full(1, first_position, np.int64),
                    np.zeros(1, np.int64),
                    np.asarray([0, 1], np.int32),
                    ((0, 1, 1),),
                    1,
                    np.zeros(1, np.int64),
                )
                sample = unpadded.fill(one, tokens, graph_texts(tokens), min(longest, tokens))
                try:
                    worker.graphs.insert(0, _Graph(self._vectors, sample, worker, self._device))
                except RuntimeError as error:
                    logger.warning("No CUDA graphs, small batches are launched kernel by kernel: %s", error)
                    return

    def _worker(self) -> _Worker:
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self._device)
        return worker


class _Worker:
    """What one thread owns: a stream, pinned memory in both directions, graphs smallest first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[_Graph] = []
        self._ids = torch.empty((3, 0), dtype=torch.int64)
        self._bounds = torch.empty(0, dtype=torch.int32)
        self._out = torch.empty((0, 0), dtype=torch.float32)

    def stage(self, flat: Flat) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy a batch to the device without waiting: (3, tokens) int64 of ids, positions, texts; (texts + 1,) int32.

        The pinned memory is free again when `read` has returned, which is before the thread's next batch.
        """
        tokens, bounds = len(flat.ids), len(flat.bounds)
        if self._ids.shape[1] < tokens:
            self._ids = torch.empty((3, 2 * tokens), dtype=torch.int64, pin_memory=True)
        if len(self._bounds) < bounds:
            self._bounds = torch.empty(2 * bounds, dtype=torch.int32, pin_memory=True)
        # One contiguous block, so that it is one transfer.
        staged = self._ids.view(-1)[: 3 * tokens].view(3, tokens)
        np.stack((flat.ids, flat.positions, flat.text_of), out=staged.numpy())
        self._bounds[:bounds] = torch.from_numpy(flat.bounds)
        return (
            staged.to(self.device, non_blocking=True),
            self._bounds[:bounds].to(self.device, non_blocking=True),
        )

    def read(self, vectors: torch.Tensor) -> np.ndarray:
        """Wait for vectors (texts, dim) on the device and copy them out as float32."""
        texts, dim = vectors.shape
        if self._out.numel() < texts * dim:
            self._out = torch.empty((2 * texts, dim), dtype=torch.float32, pin_memory=True)
        out = self._out.view(-1)[: texts * dim].view(texts, dim)
        out.copy_(vectors.float(), non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # sleeps instead of spinning: the core is wanted for tokenising
        done.record(self.stream)
        done.synchronize()
        return out.numpy().copy()


class _Graph:
    """One captured forward of a bounded shape."""

    def __init__(
        self, vectors: Callable[[dict[str, Any]], torch.Tensor], sample: Flat, worker: _Worker, device: torch.device
    ) -> None:
        self.tokens = len(sample.ids)
        self.texts = len(sample.bounds) - 1
        self.longest = sample.longest
        with torch.cuda.stream(worker.stream):
            self._ids, self._bounds = (tensor.clone() for tensor in worker.stage(sample))
            for _ in range(3):  # lazy initialisation and autotuning must not fall into the capture
                vectors(_features((self._ids, self._bounds), sample))
            worker.stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=worker.pool, stream=worker.stream, capture_error_mode="thread_local"):
            self._vectors = vectors(_features((self._ids, self._bounds), sample))

    def replay(self, staged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Run on a staged batch of this shape; the result is overwritten by the next replay."""
        self._ids.copy_(staged[0], non_blocking=True)
        self._bounds.copy_(staged[1], non_blocking=True)
        self._graph.replay()
        return self._vectors


def _features(staged: tuple[torch.Tensor, torch.Tensor], flat: Flat) -> dict[str, Any]:
    ids, bounds = staged
    return {
        "input_ids": ids[0][None],
        "position_ids": ids[1][None],
        "seq_idx": ids[2][None],
        "cu_seq_lens_q": bounds,
        "layout": Layout(flat.runs, bounds, flat.longest),
    }
