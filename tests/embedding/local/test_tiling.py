"""The layout of a batch in tiles."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.embedding.local import tiling, unpadded
from deployments.embedding.local.tiling import SHARED, TILE
from deployments.embedding.model import Tokens

LENGTHS = [5, 33, 16, 1, 17, 5, 40, 16, 12]


def test_short_texts_share_rows_and_filler_has_no_place() -> None:
    flat = unpadded.flatten([Tokens([7] * length) for length in LENGTHS], 0)
    flat = unpadded.fill(flat, 200, 14, 48)  # with empty texts in front of it and filler texts behind it
    shapes, taken, bias, source = tiling.tiles(flat.bounds, flat.place, len(flat.ids), torch.bfloat16)
    # 17 + 12, 16 + 16 and 5 + 5 + 1 tokens share a row; 33 and 40 have a row to themselves.
    assert shapes.tolist() == [[1, 16, 16], [2, 32, 32], [2, 48, 1]]
    real = sum(LENGTHS)
    assert taken[source[:real]].tolist() == list(range(real))
    assert len(source) == 200 and source.max() < len(taken) == 16 + 2 * 32 + 2 * 48
    assert bias.dtype == torch.bfloat16 and set(bias.tolist()) == {0, -torch.inf}
    assert len(bias) == 16 * 16 + 2 * 32 * 32 + 2 * 48


@given(st.lists(st.integers(1, 2 * SHARED), min_size=1, max_size=100))
def test_a_place_sees_only_its_own_text(lengths: list[int]) -> None:
    flat = unpadded.flatten([Tokens([7] * length) for length in lengths], 0)
    shapes, taken, bias, source = tiling.tiles(flat.bounds, flat.place, len(flat.ids), torch.float32)
    assert torch.equal(taken[source], torch.arange(len(flat.ids)))
    begin = 0
    for rows, width, _ in shapes.tolist():  # a row is filled up with tokens of one of its texts
        own = torch.from_numpy(flat.text_of)[taken[begin : begin + rows * width]].view(rows, width)
        begin += rows * width
        for row in own:
            assert len(row.unique_consecutive()) == len(row.unique())
    real = torch.zeros(len(taken), dtype=torch.bool)
    real[source] = True
    text_of = torch.where(real, torch.from_numpy(flat.text_of)[taken], -1)
    begin = begin_bias = 0
    for rows, width, looks in shapes.tolist():
        end, end_bias = begin + rows * width, begin_bias + rows * looks * width
        owner = text_of[begin:end].view(rows, width)
        seen = bias[begin_bias:end_bias].view(rows, looks, width).expand(rows, width, width) == 0
        if looks == 1:  # what the padding of a row with one text sees does not matter
            owner = torch.where(owner < 0, owner[:, :1], owner)
            assert torch.equal(seen[:, 0], real[begin:end].view(rows, width))
            assert all(len(row.unique()) == 1 for row in owner)
        else:
            assert torch.equal(seen, owner[:, :, None] == owner[:, None])
        begin, begin_bias = end, end_bias
    assert (begin, begin_bias) == (len(taken), len(bias))


@given(st.lists(st.integers(1, 2 * SHARED), max_size=100))
def test_rows_hold_each_text_once_and_no_two_rows_could_be_merged(lengths: list[int]) -> None:
    rows = tiling.rows_of(lengths)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    sizes = [sum(lengths[text] for text in row) for row in rows]
    assert all(len(row) == 1 or size <= SHARED for row, size in zip(rows, sizes, strict=True))
    assert sum(sorted(sizes)[:2]) > SHARED or len(rows) < 2


def test_widths_are_multiples_of_the_rows_of_the_matrix_units() -> None:
    assert SHARED % TILE == 0
    flat = unpadded.flatten([Tokens([7] * length) for length in range(1, 80)], 0)
    shapes, *_ = tiling.tiles(flat.bounds, flat.place, len(flat.ids), torch.float32)
    assert all(width % TILE == 0 for width in shapes[:, 1].tolist())
