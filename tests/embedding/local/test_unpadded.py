"""Attention over concatenated texts, compared with plain attention over each text."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from deployments.embedding.local import tiling, unpadded
from deployments.embedding.model import Tokens

LENGTHS = [5, 33, 16, 1, 17, 5, 40, 16, 12]


def flat_of(lengths: list[int]) -> unpadded.Flat:
    return unpadded.flatten([Tokens([7] * length) for length in lengths], 0)


def layout_of(flat: unpadded.Flat, dtype: torch.dtype) -> tiling.Tiles:
    return tiling.tiles(flat.bounds, flat.place, len(flat.ids), dtype)


@pytest.mark.parametrize(
    ("causal", "reach", "key_heads"),
    [(False, None, 4), (True, None, 4), (False, 3, 4), (False, None, 2)],
    ids=["plain", "causal", "window", "grouped"],
)
@pytest.mark.parametrize("lengths", [LENGTHS, [12], [16], [12, 20], [4, 11], [15, 16], [40], [48], [33, 40]], ids=str)
def test_each_text_attends_only_to_itself(lengths: list[int], causal: bool, reach: int | None, key_heads: int) -> None:
    """Covers single texts, which lie in place and are not gathered, and batches that look like single texts."""
    flat = unpadded.round_up(flat_of(lengths))
    tokens = len(flat.ids)
    random = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, tokens, 8, generator=random)
    key, value = (torch.randn(1, key_heads, tokens, 8, generator=random) for _ in range(2))
    out, _ = unpadded.attend(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        layout=layout_of(flat, torch.float32),
        is_causal=causal,
        sliding_window=None if reach is None else reach + 1,
    )
    assert out.shape == (1, tokens, 4, 8)
    start = 0
    for length in sorted(lengths):
        own = slice(start, start + length)
        near = None
        if reach is not None:
            near = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs() <= reach
        alone = scaled_dot_product_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], attn_mask=near, is_causal=causal, enable_gqa=True
        )
        # Padded places have a weight of exactly zero, but sums of another length may be rounded differently.
        torch.testing.assert_close(out[0, own], alone[0].transpose(0, 1), rtol=0, atol=1e-6)
        start += length


@pytest.mark.parametrize(
    ("causal", "window", "key_heads", "options"),
    [
        (False, None, 4, {}),
        (True, None, 4, {"window_size": (-1, 0)}),
        (False, 4, 4, {"window_size": (3, 3)}),
        (False, None, 2, {"enable_gqa": True}),
    ],
    ids=["plain", "causal", "window", "grouped"],
)
def test_on_cuda_flash_attention_is_called_with_the_texts_and_what_their_tokens_see(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None, key_heads: int, options: dict[str, Any]
) -> None:
    """Without a card, the call is recorded instead."""
    calls: list[tuple[Any, ...]] = []

    def record(*given: Any, **more: Any) -> torch.Tensor:
        calls.append((*given, more))
        return torch.zeros(145, 4, 8)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", record)
    query = torch.randn(1, 4, 145, 8)
    key, value = torch.randn(2, 1, key_heads, 145, 8)
    spans = unpadded.Spans(torch.from_numpy(flat_of(LENGTHS).bounds), 40)
    out, _ = unpadded.attend(
        torch.nn.Module(), query, key, value, None, scaling=0.5, layout=spans, is_causal=causal, sliding_window=window
    )
    assert out.shape == (1, 145, 4, 8)
    ((*given, more),) = calls
    expected = [*(one[0].transpose(0, 1) for one in (query, key, value)), spans.bounds, spans.bounds]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given[:5], expected, strict=True))
    assert (given[5:], more) == ([40, 40], {"scale": 0.5, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filler_behind_a_batch_changes_no_result(dtype: torch.dtype) -> None:
    flat = flat_of(LENGTHS)
    rounded = unpadded.round_up(flat)
    assert len(flat.ids) == 145
    assert len(rounded.ids) == 160
    assert rounded.place.tolist() == flat.place.tolist()
    assert rounded.bounds.tolist() == [*flat.bounds.tolist(), 160]
    assert unpadded.round_up(rounded) is rounded
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 160, 8, generator=random, dtype=dtype) for _ in range(3))

    def attended(one: unpadded.Flat) -> torch.Tensor:
        tokens = len(one.ids)
        heads = (x[:, :, :tokens] for x in (query, key, value))
        out, _ = unpadded.attend(torch.nn.Module(), *heads, None, layout=layout_of(one, dtype))
        assert out.shape == (1, tokens, 4, 8)
        return out

    assert torch.equal(attended(rounded)[:, :145], attended(flat))
    assert attended(rounded).isfinite().all()
