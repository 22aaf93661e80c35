"""Unpadded forwards on one CUDA device.

Each forward in flight has its own stream, pinned staging memory and graphs. So while one batch computes, the token ids
of another are copied in, or its vectors are copied out. A small batch replays a CUDA graph of the next larger shape,
which is one launch instead of hundreds. A large batch keeps the card busy by itself and runs in its exact shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deployments.embedding.local import unpadded
from deployments.embedding.local.unpadded import Flat

logger = logging.getLogger("memserve.embedding")

# The shapes of the graphs, in tokens. A larger forward is not limited by its launches.
GRAPH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def graph_texts(tokens: int) -> int:
    """The number of texts in a graph of this many tokens: enough for texts of four tokens, and filler."""
    return tokens // 4 + 4


class Gpu:
    """Runs batches on one device. Any number of threads may call `run` at once.

    Args:
        vectors: the model. It takes features and returns (texts, dim), on the device.
        device: a CUDA device.
    """

    def __init__(self, vectors: Callable[[dict[str, Any]], torch.Tensor], device: torch.device) -> None:
        self._vectors = vectors
        self._device = device
        # A stack. Workers with graphs are put back on top, so that they are taken first.
        self._idle: list[_Worker] = []
        torch.cuda.synchronize(device)  # the weights were copied on another stream

    def run(self, flat: Flat) -> np.ndarray:
        """Run one batch. Returns (texts, dim) float32 in the order of the caller's texts."""
        worker = self._take()
        try:
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(worker.stream):
                for graph in worker.graphs:
                    if unpadded.room(flat, graph.tokens, graph.texts, graph.longest):
                        bounded = unpadded.fill(flat, graph.tokens, graph.texts, graph.longest)
                        return worker.read(graph.replay(worker.stage(bounded)))[bounded.place]
                return worker.read(self._vectors(_features(worker.stage(flat), flat)))[flat.place]
        except Exception:
            worker.stream.synchronize()  # a copy may still read the memory in which the next batch will be staged
            raise
        finally:
            self._give_back(worker)

    def capture(self, forwards: int, longest: int, one: Flat, max_batch_tokens: int) -> None:
        """Capture graphs for this many forwards in flight. Nothing else may run on the device meanwhile.

        If the model cannot be captured, a warning is logged and small batches run without graphs.

        Args:
            longest: tokens of the longest text that the model reads.
            one: a batch of a single token.
            max_batch_tokens: tokens of the largest batch; graphs that are larger than needed for it are not captured.
        """
        sizes = [tokens for tokens in GRAPH_TOKENS if tokens < 2 * max_batch_tokens]
        workers = [_Worker(self._device) for _ in range(forwards)]
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                for worker in workers:
                    for tokens in reversed(sizes):  # largest first: the others reuse its memory
                        sample = unpadded.fill(one, tokens, graph_texts(tokens), min(longest, tokens))
                        worker.graphs.insert(0, _Graph(self._vectors, sample, worker))
        except RuntimeError as error:
            logger.warning("CUDA graphs cannot be captured; small batches are launched kernel by kernel: %s", error)
            for worker in workers:
                worker.graphs.clear()
        self._idle += workers

    def _take(self) -> _Worker:
        try:
            return self._idle.pop()
        except IndexError:
            return _Worker(self._device)

    def _give_back(self, worker: _Worker) -> None:
        if worker.graphs:
            self._idle.append(worker)
        else:
            self._idle.insert(0, worker)


class _Worker:
    """The resources of one forward in flight: a stream, pinned memory for both directions, graphs (smallest first)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: list[_Graph] = []
        self._rows = torch.empty(0, dtype=torch.int64)
        self._bounds = torch.empty(0, dtype=torch.int32)
        self._out = torch.empty((0, 0), dtype=torch.float32)

    def stage(self, flat: Flat) -> tuple[torch.Tensor, torch.Tensor]:
        """Start to copy a batch to the device.

        The pinned memory may be written again after `read` has returned or the stream was synchronised. One of both
        happens before the worker's next batch.

        Returns:
            (rows, tokens) int64 with `Flat.rows`, and (texts + 1,) int32 with bounds, on the device.
        """
        rows, tokens, bounds = flat.rows(), len(flat.ids), len(flat.bounds)
        if len(self._rows) < len(rows) * tokens:
            self._rows = torch.empty(2 * len(rows) * tokens, dtype=torch.int64, pin_memory=True)
        if len(self._bounds) < bounds:
            self._bounds = torch.empty(2 * bounds, dtype=torch.int32, pin_memory=True)
        # One contiguous block is one transfer.
        staged = self._rows[: len(rows) * tokens].view(len(rows), tokens)
        np.stack(rows, out=staged.numpy())
        self._bounds[:bounds] = torch.from_numpy(flat.bounds)
        return (
            staged.to(self.device, non_blocking=True),
            self._bounds[:bounds].to(self.device, non_blocking=True),
        )

    def read(self, vectors: torch.Tensor) -> np.ndarray:
        """Wait for vectors on the device, (texts, dim), and copy them to the host as float32."""
        texts, dim = vectors.shape
        if self._out.numel() < texts * dim:
            self._out = torch.empty((2 * texts, dim), dtype=torch.float32, pin_memory=True)
        out = self._out.view(-1)[: texts * dim].view(texts, dim)
        out.copy_(vectors.float(), non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # sleeps instead of spinning: the core is needed for tokenizing
        done.record(self.stream)
        done.synchronize()
        return out.numpy().copy()


class _Graph:
    """One captured forward of a fixed shape."""

    def __init__(self, vectors: Callable[[dict[str, Any]], torch.Tensor], sample: Flat, worker: _Worker) -> None:
        self.tokens = len(sample.ids)
        self.texts = len(sample.bounds) - 1
        self.longest = sample.longest
        with torch.cuda.stream(worker.stream):
            self._rows, self._bounds = (tensor.clone() for tensor in worker.stage(sample))
            for _ in range(3):  # lazy initialisation and autotuning must be over before the capture
                vectors(_features((self._rows, self._bounds), sample))
            worker.stream.synchronize()
            # An operator that makes the host wait cannot be captured (weighted mean pooling has one). A capture that
            # fails is not undone: torch's allocator continues as if it were in progress, and does not release its cache
            # when memory is short. So this run raises instead, before the capture.
            torch.cuda.set_sync_debug_mode("error")
            try:
                vectors(_features((self._rows, self._bounds), sample))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=worker.pool, stream=worker.stream, capture_error_mode="thread_local"):
            self._vectors = vectors(_features((self._rows, self._bounds), sample))

    def replay(self, staged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Run on a staged batch of this shape. The next replay overwrites the result."""
        self._rows.copy_(staged[0], non_blocking=True)
        self._bounds.copy_(staged[1], non_blocking=True)
        self._graph.replay()
        return self._vectors


def _features(staged: tuple[torch.Tensor, torch.Tensor], flat: Flat) -> dict[str, Any]:
    rows, bounds = staged
    return unpadded.as_features(list(rows), bounds, unpadded.Spans(bounds, flat.longest))
