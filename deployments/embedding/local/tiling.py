"""Attention on CPU over texts that lie end to end: tiles of equal width, each a dense attention of its own.

A tile's rows are places for tokens. A text longer than `SHARED` has a row for itself. Shorter ones share rows, and a
bias hides them from each other: what attention to a few tokens costs is the calls to matrix products, not their size.
No bias hides a number that is not finite: one in a text spoils those that share its row, and no others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from deployments.embedding.local import torchscript

# Widths are multiples of so many tokens: it is called less often than there are lengths, and in half precision takes
# half as long where a width is a multiple of the matrix units' 16 rows.
TILE = 16
# The widest row that texts share. Of all multiples of TILE it takes the least time for a token (all-MiniLM, bfloat16).
SHARED = 32


class Tiles(NamedTuple):
    """Where the tokens of a batch are in its tiles.

    Attributes:
        shapes: (tiles, 3) int64: rows and width of each, and how many biases a row has: one for each place that looks
            (width), or the same for all (1).
        taken: (places,) int64, the token in each place of each row, tile after tile; one of the row where it is padded.
        bias: (biases,) in the dtype of the weights, tile after tile; 0, or minus infinity where a place is not seen.
        source: (tokens,) int64, the place of each token; any of a token that is filler.
    """

    shapes: torch.Tensor
    taken: torch.Tensor
    bias: torch.Tensor
    source: torch.Tensor


def tiles(bounds: np.ndarray, texts: np.ndarray, tokens: int, dtype: torch.dtype) -> Tiles:
    """Lay out a batch.

    Args:
        bounds: (all texts + 1,) where each text begins and ends among the tokens.
        texts: those that are asked for; the others are filler.
        tokens: of the batch, with its filler.
        dtype: of the weights.
    """
    starts, lengths = bounds[texts].tolist(), np.diff(bounds)[texts].tolist()
    of_width: dict[int, list[list[int]]] = {}
    for row in rows_of(lengths):
        width = -(-sum(lengths[text] for text in row) // TILE) * TILE
        of_width.setdefault(width, []).append(row)
    source = np.zeros(tokens, np.int64)
    shapes, taken, hidden = [], [], []
    begin = 0
    for width, rows in sorted(of_width.items()):
        token = np.zeros((len(rows), width), np.int64)
        text_of = np.full((len(rows), width), -1)
        for index, row in enumerate(rows):
            end = 0
            for text in sorted(row, key=starts.__getitem__):  # as they lie: a row that is all there is, is not gathered
                place, end = end, end + lengths[text]
                token[index, place:end] = range(starts[text], starts[text] + lengths[text])
                text_of[index, place:end] = text
            token[index, end:] = token[index, end - 1]
        real = np.flatnonzero(text_of.ravel() >= 0)
        source[token.ravel()[real]] = begin + real
        looks = width if width <= SHARED else 1
        shapes.append((len(rows), width, looks))
        taken.append(token.ravel())
        hidden.append((text_of[:, :looks, None] != text_of[:, None, :]).ravel())
        begin += token.size
    bias = torch.from_numpy(np.concatenate(hidden))
    bias = torch.zeros(len(bias), dtype=dtype).masked_fill_(bias, -torch.inf)
    return Tiles(torch.tensor(shapes), torch.from_numpy(np.concatenate(taken)), bias, torch.from_numpy(source))


def rows_of(lengths: list[int]) -> list[list[int]]:
    """Which texts share a row: best fit, longest first. Those longer than `SHARED` are alone."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(SHARED + 1)]  # rows by the tokens that still fit
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        room = next((room for room in range(length, SHARED + 1) if with_room[room]), None)
        if room is None:
            row = len(rows)
            rows.append([])
            room = SHARED
        else:
            row = with_room[room].pop()
        rows[row].append(text)
        if length <= room:
            with_room[room - length].append(row)
    return rows


@torchscript.script
def attend(  # noqa: PLR0917 - TorchScript does not record a call by keyword
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shapes: torch.Tensor,
    taken: torch.Tensor,
    bias: torch.Tensor,
    source: torch.Tensor,
    scale: float | None,
    is_causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """Attention of each text to itself. As TorchScript, a recorded forward holds the loop for any number of tiles.

    Args:
        query, key, value: (tokens, heads, head_dim); key and value may have fewer heads.
        shapes, taken, bias, source: see Tiles.
        scale: of the products; None is 1 / sqrt(head_dim).
        is_causal: a token sees none behind it.
        reach: how far to either side a token sees; None is all of its text.

    Returns:
        (tokens, heads, head_dim).
    """
    bias = bias.to(query.dtype)  # which a model may have raised
    grouped = query.size(1) != key.size(1)
    parts: list[torch.Tensor] = []
    begin = 0
    begin_bias = 0
    for tile in range(shapes.size(0)):
        rows, width, looks = int(shapes[tile, 0]), int(shapes[tile, 1]), int(shapes[tile, 2])
        end, end_bias = begin + rows * width, begin_bias + rows * looks * width
        q, k, v = query, key, value
        if shapes.size(0) > 1 or rows > 1 or width != query.size(0):  # else it is all there is, and lies as it should
            of_tile = taken[begin:end]
            q, k, v = q.index_select(0, of_tile), k.index_select(0, of_tile), v.index_select(0, of_tile)
        mask: torch.Tensor | None = bias[begin_bias:end_bias].view(rows, 1, looks, width)
        behind = False
        if is_causal and looks == 1:  # what pads is behind the only text: no token sees it
            mask = None
            behind = True
        elif mask is not None and (is_causal or reach is not None):
            offsets = torch.arange(width)
            away = offsets[None] - offsets[:, None]
            if is_causal:
                mask = mask.masked_fill(away > 0, -torch.inf)
            if reach is not None:
                mask = mask.masked_fill(away.abs() > reach, -torch.inf)
        out = scaled_dot_product_attention(
            q.unflatten(0, (rows, width)).transpose(1, 2),
            k.unflatten(0, (rows, width)).transpose(1, 2),
            v.unflatten(0, (rows, width)).transpose(1, 2),
            attn_mask=mask,
            is_causal=behind,
            scale=scale,
            enable_gqa=grouped,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        begin, begin_bias = end, end_bias
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.index_select(0, source)
