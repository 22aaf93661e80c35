"""Attention over texts that lie end to end: by tile as by run of one length, against plain attention of each text."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deployments.embedding import unpadded
from deployments.embedding.model import Tokens

Way = Callable[..., Iterator[torch.Tensor]]
LENGTHS = [5, 33, 16, 1, 17, 5, 40, 16, 12]


def layout_of(lengths: list[int]) -> unpadded.Layout:
    flat = unpadded.flatten([Tokens([0] * length) for length in lengths], 0)
    return unpadded.Layout(flat.runs, torch.from_numpy(flat.bounds), flat.longest)


@pytest.mark.parametrize("way", [unpadded._by_run, unpadded._by_tile], ids=["runs", "tiles"])
@pytest.mark.parametrize(
    ("causal", "reach", "key_heads"),
    [(False, None, 4), (True, None, 4), (False, 3, 4), (False, None, 2)],
    ids=["plain", "causal", "window", "grouped"],
)
def test_each_text_attends_to_itself_alone(way: Way, causal: bool, reach: int | None, key_heads: int) -> None:
    random = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    query = torch.randn(1, 4, tokens, 8, generator=random)
    key, value = (torch.randn(1, key_heads, tokens, 8, generator=random) for _ in range(2))
    how = {"scale": None, "is_causal": causal, "enable_gqa": key_heads != 4}
    mixed = torch.cat(list(way(query, key, value, layout_of(LENGTHS), reach, **how)))
    assert mixed.shape == (tokens, 4, 8)
    start = 0
    for length in sorted(LENGTHS):
        own = slice(start, start + length)
        near = None
        if reach is not None:
            near = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs() <= reach
        alone = scaled_dot_product_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=near, is_causal=causal, enable_gqa=True
        )
        # Padded places weigh exactly nothing; sums of another length may round another way.
        torch.testing.assert_close(mixed[own], alone[0].transpose(0, 1), rtol=0, atol=1e-6)
        start += length


def test_tiles_hold_every_token_once_in_order() -> None:
    layout = layout_of(LENGTHS)
    assert [(tile.texts, tile.width) for tile in layout.tiles] == [(6, 16), (1, 32), (2, 48)]
    taken = torch.cat([tile.taken[tile.kept] for tile in layout.tiles])
    assert np.array_equal(taken.numpy(), np.arange(sum(LENGTHS)))
    assert all(tile.seen is not None for tile in layout.tiles)
    assert layout_of([16, 32, 16]).tiles[0].seen is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filler_behind_a_batch_changes_no_text(dtype: torch.dtype) -> None:
    flat = unpadded.flatten([Tokens([7] * length) for length in LENGTHS], 0)
    rounded = unpadded.round_up(flat)
    assert len(flat.ids) == 145
    assert len(rounded.ids) == 160
    assert (rounded.runs, rounded.place.tolist()) == (flat.runs, flat.place.tolist())
    assert rounded.bounds.tolist() == [*flat.bounds.tolist(), 160]
    assert unpadded.round_up(rounded) is rounded
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 160, 8, generator=random, dtype=dtype) for _ in range(3))

    def attended(one: unpadded.Flat) -> torch.Tensor:
        tokens = len(one.ids)
        layout = unpadded.Layout(one.runs, torch.from_numpy(one.bounds), one.longest)
        heads = (x[:, :, :tokens] for x in (query, key, value))
        out, _ = unpadded.attend(torch.nn.Module(), *heads, None, layout=layout)
        assert out.shape == (1, tokens, 4, 8)
        return out

    assert torch.equal(attended(rounded)[:, :145], attended(flat))
    assert attended(rounded).isfinite().all()
