"""Unpadded forwards on one CUDA device.

Each forward in flight has a stream, pinned staging memory and graphs of its own: while one batch computes, the other's
token ids go in and its vectors come out. A small batch replays a CUDA graph of the next larger shape, one launch in
place of hundreds; a large one, which keeps the card busy by itself, runs in its exact shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from deployments.embedding.local import unpadded
from deployments.embedding.local.unpadded import Flat
from deployments.embedding.model import Tokens

logger = logging.getLogger("memserve.embedding")

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
    """

    def __init__(self, vectors: Callable[[dict[str, Any]], torch.Tensor], device: torch.device) -> None:
        self._vectors = vectors
        self._device = device
        # A stack: the workers with graphs, which come back on top, are taken first.
        self._idle: list[_Worker] = []
        torch.cuda.synchronize(device)  # the weights came in on another stream

    def run(self, flat: Flat) -> np.ndarray:
        """Run one batch. Returns (texts, dim) float32 in the caller's order."""
        worker = self._take()
        try:
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(worker.stream):
                for graph in worker.graphs:
                    if unpadded.room(flat, graph.tokens, graph.texts, graph.longest):
                        bounded = unpadded.fill(flat, graph.tokens, graph.texts, graph.longest)
                        return worker.read(graph.replay(worker.stage(bounded)))[bounded.place]
                return worker.read(self._vectors(_features(worker.stage(flat), flat)))[flat.place]
        except Exception:
            worker.stream.synchronize()  # it may still be copied out of the memory that the next batch is staged in
            raise
        finally:
            self._give_back(worker)

    def capture(self, forwards: int, longest: int, first_position: int, max_batch_tokens: int) -> None:
        """Make the graphs of so many forwards in flight. Nothing else may run on the device meanwhile.

        Args:
            longest: tokens of the longest text that the model reads.
            first_position: what the model calls the position of a text's first token.
            max_batch_tokens: no graph is larger than the smallest that holds it.
        """
        sizes = [tokens for tokens in GRAPH_TOKENS if tokens < 2 * max_batch_tokens]
        one = unpadded.flatten([Tokens([0])], first_position)
        workers = [_Worker(self._device) for _ in range(forwards)]
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                for worker in workers:
                    for tokens in reversed(sizes):  # the largest first: the others fit into its memory
                        sample = unpadded.fill(one, tokens, graph_texts(tokens), min(longest, tokens))
                        worker.graphs.insert(0, _Graph(self._vectors, sample, worker))
        except RuntimeError as error:
            logger.warning("No CUDA graphs, small batches are launched kernel by kernel: %s", error)
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
    """What one forward in flight owns: a stream, pinned memory in both directions, graphs smallest first."""

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

        The pinned memory is free again when `read` has returned, or the stream has been waited for, which is before the
        worker's next batch.
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
        done = torch.cuda.Event(blocking=True)  # sleeps instead of spinning: the core is wanted for tokenizing
        done.record(self.stream)
        done.synchronize()
        return out.numpy().copy()


class _Graph:
    """One captured forward of a bounded shape."""

    def __init__(self, vectors: Callable[[dict[str, Any]], torch.Tensor], sample: Flat, worker: _Worker) -> None:
        self.tokens = len(sample.ids)
        self.texts = len(sample.bounds) - 1
        self.longest = sample.longest
        with torch.cuda.stream(worker.stream):
            self._ids, self._bounds = (tensor.clone() for tensor in worker.stage(sample))
            for _ in range(3):  # lazy initialisation and autotuning must not fall into the capture
                vectors(_features((self._ids, self._bounds), sample))
            worker.stream.synchronize()
            # What makes the host wait (weighted mean pooling does) cannot be captured, and a capture that fails is not
            # undone: torch's allocator takes it for under way ever after, and keeps its cache when memory is short.
            torch.cuda.set_sync_debug_mode("error")
            try:
                vectors(_features((self._ids, self._bounds), sample))
            finally:
                torch.cuda.set_sync_debug_mode("default")
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
    (ids, positions, text_of), bounds = staged
    return unpadded.as_features(ids, positions, text_of, bounds, unpadded.Spans(bounds, flat.longest))
