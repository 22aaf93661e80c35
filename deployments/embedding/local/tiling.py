"""Attention on CPU over concatenated texts, computed in tiles. Each tile is one dense attention.

A tile has rows of equal width, and a row has places for tokens. A text longer than `SHARED` has a row to itself.
Shorter texts share rows, and a bias hides them from each other: attention over few tokens costs by the number of matrix
products, not by their size.

A bias does not hide a number that is not finite. If a text has one, it spoils the texts in the same row, but no others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from deployments.embedding.local import torchscript

# Widths are multiples of this number of tokens. So there are fewer tiles than lengths, and in half precision a tile
# takes half the time if its width is a multiple of the 16 rows of the CPU's matrix units.
TILE = 16
# The widest row that texts share. Of all multiples of TILE, it takes the least time per token (all-MiniLM, bfloat16).
SHARED = 32


class Tiles(NamedTuple):
    """Where the tokens of a batch are in its tiles.

    Attributes:
        shapes: (tiles, 3) int64: the number of rows, their width, and the number of bias vectors per row. That is one
            for each place of the row (width), or one for all of them (1).
        taken: (places,) int64, the token at each place of each row, tile after tile. A place of padding repeats a token
            of its row.
        bias: (biases,) in the dtype of the weights, tile after tile: 0 if a place is seen, else minus infinity.
        source: (tokens,) int64, the place of each token. For filler tokens it is arbitrary.
    """

    shapes: torch.Tensor
    taken: torch.Tensor
    bias: torch.Tensor
    source: torch.Tensor


def tiles(bounds: np.ndarray, texts: np.ndarray, tokens: int, dtype: torch.dtype) -> Tiles:
    """Lay out a batch in tiles.

    Args:
        bounds: (all texts + 1,), where each text begins and ends among the tokens.
        texts: indices of the real texts; the others are filler.
        tokens: the number of tokens of the batch, including filler.
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
            # In the order of the batch: a row that is the whole batch need not be gathered.
            for text in sorted(row, key=starts.__getitem__):
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
    """Assign texts to rows: best fit, longest first. A text longer than `SHARED` is alone in its row."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(SHARED + 1)]  # rows by the number of tokens that still fit
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
def _hide_distant(bias: torch.Tensor, is_causal: bool, reach: int | None) -> torch.Tensor:
    """Hide from each place of a row the places behind it (if causal), and those that are farther away than `reach`.

    Args:
        bias: (rows, 1, width or 1, width).

    Returns:
        (rows, 1, width, width), or the bias itself if it hides nothing more.
    """
    if is_causal or reach is not None:
        offsets = torch.arange(bias.size(3))
        away = offsets[None] - offsets[:, None]  # (width, width)
        if is_causal:
            bias = bias.masked_fill(away > 0, -torch.inf)
        if reach is not None:
            bias = bias.masked_fill(away.abs() > reach, -torch.inf)
    return bias


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
    """Attend from each text to itself. TorchScript keeps the loop over the tiles, whose number varies, in a recording.

    Args:
        query, key, value: (tokens, heads, head_dim); key and value may have fewer heads.
        shapes, taken, bias, source: see Tiles.
        scale: of the products; None is 1 / sqrt(head_dim).
        is_causal: whether a token sees only itself and the tokens before it.
        reach: how many tokens to either side a token sees; None is all of its text.

    Returns:
        (tokens, heads, head_dim).
    """
    bias = bias.to(query.dtype)  # a model may have raised the dtype of its queries
    grouped = query.size(1) != key.size(1)
    parts: list[torch.Tensor] = []
    begin = 0
    begin_bias = 0
    for tile in range(shapes.size(0)):
        rows, width, looks = int(shapes[tile, 0]), int(shapes[tile, 1]), int(shapes[tile, 2])
        end, end_bias = begin + rows * width, begin_bias + rows * looks * width
        q, k, v = query, key, value
        if shapes.size(0) > 1 or rows > 1 or width != query.size(0):  # else the tile is the batch as it lies
            of_tile = taken[begin:end]
            q, k, v = q.index_select(0, of_tile), k.index_select(0, of_tile), v.index_select(0, of_tile)
        mask: torch.Tensor | None = None
        needs_no_mask = is_causal and looks == 1  # padding is behind the only text: no token sees it
        if not needs_no_mask:
            mask = _hide_distant(bias[begin_bias:end_bias].view(rows, 1, looks, width), is_causal, reach)
        out = scaled_dot_product_attention(
            q.unflatten(0, (rows, width)).transpose(1, 2),
            k.unflatten(0, (rows, width)).transpose(1, 2),
            v.unflatten(0, (rows, width)).transpose(1, 2),
            attn_mask=mask,
            is_causal=needs_no_mask,
            scale=scale,
            enable_gqa=grouped,
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        begin, begin_bias = end, end_bias
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.index_select(0, source)
