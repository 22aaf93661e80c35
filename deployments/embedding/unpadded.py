"""Forwards without padding: the texts of a batch laid end to end, each attending to itself alone.

Everything in an encoder but its attention works token by token, so a batch of mixed lengths costs what its real tokens
cost. The model's own modules run; only the function that its attention layers call is exchanged, through the interface
that transformers has for it. On CUDA in half precision that function is torch's variable-length flash attention; on CPU
it is one dense attention for each length that occurs in the batch, or, in half precision, for each multiple of `TILE`.

Whether a model gives the same vectors so is not guessed: LocalModel runs a few texts both ways and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from deployments.embedding.model import Tokens

IMPLEMENTATION = "memserve_unpadded"
# Half-precision attention on CPU takes half as long where a length is a multiple of the matrix units' 16 rows: there,
# and there alone, texts are padded to it.
TILE = 16


class Tile(NamedTuple):
    """Texts that are padded to one length for their attention.

    Attributes:
        texts: how many.
        width: the length, in tokens.
        taken: (texts * width,) int64, the token in each place; any in a padded one.
        seen: (texts, 1, 1, width) bool, the places that are not padded; None where none is.
        kept: (tokens,) int64, the places that are not padded.
    """

    texts: int
    width: int
    taken: torch.Tensor
    seen: torch.Tensor | None
    kept: torch.Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the texts of a batch lie.

    Attributes:
        runs: (first token, texts, length) of each run of texts of one length, in order, shortest first. What is behind
            them is filler.
        bounds: (texts + 1,) int32 on the device, where each text begins and ends.
        longest: tokens of the longest text.
    """

    runs: tuple[tuple[int, int, int], ...]
    bounds: torch.Tensor
    longest: int

    @cached_property
    def tiles(self) -> list[Tile]:
        """The texts by their lengths, rounded up to a multiple of `TILE`; in order."""
        lengths = np.repeat([length for _, _, length in self.runs], [texts for _, texts, _ in self.runs])
        starts = np.cumsum(lengths) - lengths
        widths = -(-lengths // TILE) * TILE
        tiles = []
        for width in np.unique(widths).tolist():
            of_tile = widths == width
            places = np.arange(width)
            real = places < lengths[of_tile, None]  # (texts, width)
            taken = starts[of_tile, None] + np.minimum(places, lengths[of_tile, None] - 1)
            seen = None if real.all() else torch.from_numpy(real)[:, None, None]
            kept = torch.from_numpy(np.flatnonzero(real))
            tiles.append(Tile(len(real), width, torch.from_numpy(taken.ravel()), seen, kept))
        return tiles


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A batch without padding, texts sorted by length.

    Attributes:
        ids, positions, text_of: (tokens,) int64: token id, place in its text, and which text it belongs to.
        bounds: (texts + 1,) int32.
        runs, longest: see Layout.
        place: (texts of the caller,) int64, where in this batch each of them is.
    """

    ids: np.ndarray
    positions: np.ndarray
    text_of: np.ndarray
    bounds: np.ndarray
    runs: tuple[tuple[int, int, int], ...]
    longest: int
    place: np.ndarray


def flatten(batch: Sequence[Tokens], first_position: int) -> Flat:
    """Lay a batch end to end, shortest text first.

    Args:
        batch: not empty.
        first_position: what the model calls the position of a text's first token. Behind a padding index, RoBERTa and
            its kin give that index to a text's own padding tokens, too, and count on without them.
    """
    lengths = np.fromiter((len(tokens) for tokens in batch), np.int64, len(batch))
    order = np.argsort(lengths, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(batch))
    lengths = lengths[order]
    bounds = np.zeros(len(batch) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    ids = np.fromiter(chain.from_iterable(batch[text].ids for text in order.tolist()), np.int64, bounds[-1])
    text_of = np.repeat(np.arange(len(batch)), lengths)
    positions = np.arange(len(ids)) - bounds[text_of] + first_position
    counts_on = ids != first_position - 1
    if not counts_on.all():
        counted = np.concatenate([[0], np.cumsum(counts_on)])
        positions = np.where(counts_on, counted[:-1] - counted[bounds[text_of]] + first_position, first_position - 1)
    distinct, firsts, counts = np.unique(lengths, return_index=True, return_counts=True)
    runs = tuple(zip(bounds[firsts].tolist(), counts.tolist(), distinct.tolist(), strict=True))
    return Flat(ids, positions, text_of, bounds.astype(np.int32), runs, int(lengths[-1]), place)


def fill(flat: Flat, tokens: int, texts: int, longest: int) -> Flat:
    """The same batch in a bounded shape, for CUDA graphs: filler texts behind it, empty texts in front of it.

    The empty ones are in front because a pooling that takes a text's first token may not look behind the last one.

    Args:
        tokens, texts: of the result; `room` says whether they suffice.
        longest: no filler text is longer.
    """
    used, given = len(flat.ids), len(flat.bounds) - 1
    ends = [*range(used + longest, tokens, longest), tokens] if used < tokens else []
    empty = texts - given - len(ends)
    filler = np.asarray(ends, np.int64)
    starts = np.asarray([used, *ends[:-1]], np.int64) if ends else filler
    sizes = filler - starts
    first = int(flat.positions[0])
    behind = tokens - used
    place_in_filler = np.arange(behind) - np.repeat(starts - used, sizes)
    return Flat(
        np.concatenate([flat.ids, np.zeros(behind, np.int64)]),
        np.concatenate([flat.positions, place_in_filler + first]),
        np.concatenate([flat.text_of + empty, np.repeat(np.arange(len(ends)) + empty + given, sizes)]),
        np.concatenate([np.zeros(empty, np.int32), flat.bounds, filler.astype(np.int32)]),
        (*flat.runs, *((int(start), 1, int(size)) for start, size in zip(starts, sizes, strict=True))),
        longest,
        flat.place + empty,
    )


def round_up(flat: Flat) -> Flat:
    """The same batch with filler tokens behind it, up to a multiple of `TILE`, for half precision on CPU.

    oneDNN makes a program for each number of tokens, which takes it longer than a small product, and keeps 1,024 of
    them. Batches of any length would make it forget and make them again for ever.
    """
    tokens = -(-len(flat.ids) // TILE) * TILE
    if tokens == len(flat.ids):
        return flat
    # What the filler attends to is of no interest: it is in no run.
    return replace(fill(flat, tokens, len(flat.bounds), max(flat.longest, TILE)), runs=flat.runs)


def room(flat: Flat, tokens: int, texts: int, longest: int) -> bool:
    """Whether a batch fits into a bounded shape."""
    filler = -(-(tokens - len(flat.ids)) // longest)
    return len(flat.ids) <= tokens and len(flat.bounds) - 1 + filler <= texts and flat.longest <= longest


def features(flat: Flat, device: torch.device) -> dict[str, Any]:
    """What sentence-transformers' modules are given: tensors with a batch dimension of one, on the device."""
    bounds = torch.from_numpy(flat.bounds).to(device)
    return {
        "input_ids": torch.from_numpy(flat.ids).to(device)[None],
        "position_ids": torch.from_numpy(flat.positions).to(device)[None],
        "seq_idx": torch.from_numpy(flat.text_of).to(device)[None],
        **layout(flat, bounds),
    }


def layout(flat: Flat, bounds: torch.Tensor) -> dict[str, Any]:
    """The features that are not token by token. `bounds` are the batch's, on the device."""
    # A mask of four dimensions is taken as it is: none is built for the whole batch, tokens x tokens, to be ignored.
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=bounds.device)
    return {"cu_seq_lens_q": bounds, "attention_mask": mask, "layout": Layout(flat.runs, bounds, flat.longest)}


def first_position(model: torch.nn.Module) -> int:
    """What a model calls the first position: RoBERTa and its kin count from behind the padding index, others from 0."""
    for module in model.modules():
        padding_idx = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding_idx, int) and isinstance(table, torch.nn.Embedding):
            return padding_idx + 1
    return 0


def install(model: Any) -> bool:
    """Make a transformers model call `attend`, for padded batches too. False, and unchanged, if it cannot."""
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa" or not getattr(model, "is_backend_compatible", lambda: False)():
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a padded batch (`layout` None: transformers' own) or over texts that lie end to end.

    Args:
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the layer asks for what the unpadded form does not have (a bias, a cap, a causal window).
    """
    if layout is None:
        sdpa = AttentionInterface._global_mapping["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    for name in ("position_bias", "softcap", "s_aux", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"unpadded attention has no {name}")
    is_causal = bool(getattr(module, "is_causal", False) if options.get("is_causal") is None else options["is_causal"])
    reach = None  # how far to either side a token sees
    if options.get("sliding_window") is not None:
        if is_causal:
            raise NotImplementedError("unpadded attention has no causal window")
        reach = options["sliding_window"] - 1
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        unusual: dict[str, Any] = {}
        if is_causal or reach is not None:
            unusual["window_size"] = (-1, 0) if reach is None else (reach, reach)
        if grouped:
            unusual["enable_gqa"] = True
        mixed = varlen_attn(
            query[0].transpose(0, 1),  # (tokens, heads, head_dim)
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            layout.bounds,
            layout.bounds,
            layout.longest,
            layout.longest,
            scale=scaling,
            **unusual,
        )
        return cast(torch.Tensor, mixed)[None], None
    how = {"scale": scaling, "is_causal": is_causal, "enable_gqa": grouped}
    by_tile = query.dtype != torch.float32 and len(layout.runs) > 2  # fewer calls are not worth the padding
    parts = list((_by_tile if by_tile else _by_run)(query, key, value, layout, reach, **how))
    start, texts, length = layout.runs[-1]
    if (end := start + texts * length) < query.shape[2]:
        parts.append(query[0, :, end:].transpose(0, 1))  # filler: anything that is finite
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _by_run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    reach: int | None,
    **how: Any,
) -> Iterator[torch.Tensor]:
    """(tokens, heads, head_dim) of each run of texts of one length."""
    for start, texts, length in layout.runs:
        end = start + texts * length
        # (1, heads, texts * length, head_dim) -> (texts, heads, length, head_dim), views
        q, k, v = (one[0, :, start:end].unflatten(1, (texts, length)).transpose(0, 1) for one in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=_near(length, reach), **how)
        yield out.transpose(1, 2).flatten(0, 1)  # (texts * length, heads, head_dim)


def _by_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    reach: int | None,
    **how: Any,
) -> Iterator[torch.Tensor]:
    """(tokens, heads, head_dim) of each tile."""
    flat = [one[0].transpose(0, 1) for one in (query, key, value)]  # (tokens, heads, head_dim)
    for tile in layout.tiles:
        q, k, v = (
            one.index_select(0, tile.taken).unflatten(0, (tile.texts, tile.width)).transpose(1, 2) for one in flat
        )
        mask = _near(tile.width, reach)
        if tile.seen is not None and not how["is_causal"]:  # what pads is behind a text: causal tokens see none
            mask = tile.seen if mask is None else tile.seen & mask
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **how)
        out = out.transpose(1, 2).flatten(0, 1)  # (texts * width, heads, head_dim)
        yield out if tile.seen is None else out.index_select(0, tile.kept)


def _near(length: int, reach: int | None) -> torch.Tensor | None:
    """(length, length) bool, which tokens see each other; None where all do."""
    if reach is None or length <= reach + 1:
        return None
    places = torch.arange(length)
    return (places[:, None] - places[None]).abs() <= reach
