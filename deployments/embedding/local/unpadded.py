"""Forwards without padding: the texts of a batch are concatenated, and each attends only to itself.

All parts of an encoder but its attention work token by token, so a batch of mixed lengths costs only its real tokens.
The model's own modules run. Only the function that its attention layers call is replaced, through the interface that
transformers has for this. On CUDA in half precision it is torch's variable-length flash attention; on CPU it is a dense
attention over texts in tiles (tiling.py).

Each model is tested, because some may give other vectors this way: forward.py embeds a few texts with and without
padding and compares the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from deployments.embedding.local import tiling
from deployments.embedding.local.tiling import TILE, Tiles
from deployments.embedding.model import Tokens

IMPLEMENTATION = "memserve_unpadded"


class Spans(NamedTuple):
    """The places of the texts in a batch, in the form that attention on CUDA takes.

    Attributes:
        bounds: (texts + 1,) int32 on the device, where each text begins and ends.
        longest: tokens of the longest text.
    """

    bounds: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A batch without padding, texts sorted by length.

    Attributes:
        ids, positions, text_of: (tokens,) int64: the token id, its position in its text, and the index of its text.
        types: (tokens,) int64, 0 in the first part of a pair and 1 in the second; None if the model does not read it.
        bounds: (texts + 1,) int32, where each text begins and ends.
        longest: tokens of the longest text.
        place: (texts of the caller,) int64, the index in this batch of each text of the caller. All other texts are
            filler.
    """

    ids: np.ndarray
    positions: np.ndarray
    text_of: np.ndarray
    bounds: np.ndarray
    longest: int
    place: np.ndarray
    types: np.ndarray | None = None

    def rows(self) -> list[np.ndarray]:
        """What the model reads of each token: `ids`, `positions`, `text_of` and, if it reads them, `types`."""
        rows = [self.ids, self.positions, self.text_of]
        return rows if self.types is None else [*rows, self.types]


def flatten(batch: Sequence[Tokens], first_position: int, *, token_types: bool = False) -> Flat:
    """Concatenate the texts of a batch, shortest first.

    Args:
        batch: not empty.
        first_position: the position that the model gives to the first token of a text. If positions start behind a
            padding index, as in RoBERTa and similar models, padding tokens within a text get this index and are not
            counted.
        token_types: whether the model reads the types of tokens.
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
    types = None
    if token_types:
        in_first = np.fromiter((batch[text].prompt_tokens for text in order.tolist()), np.int64, len(batch))
        types = (np.arange(len(ids)) - bounds[text_of] >= in_first[text_of]).astype(np.int64)
    return Flat(ids, positions, text_of, bounds.astype(np.int32), int(lengths[-1]), place, types)


def fill(flat: Flat, tokens: int, texts: int, longest: int) -> Flat:
    """Extend a batch to a fixed shape, for CUDA graphs: filler texts follow it, empty texts precede it.

    Empty texts are in front because a pooling that takes the first token of a text must not read past the last token.

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
        np.concatenate([flat.ids, np.full(behind, flat.ids[-1])]),
        np.concatenate([flat.positions, place_in_filler + first]),
        np.concatenate([flat.text_of + empty, np.repeat(np.arange(len(ends)) + empty + given, sizes)]),
        np.concatenate([np.zeros(empty, np.int32), flat.bounds, filler.astype(np.int32)]),
        longest,
        flat.place + empty,
        None if flat.types is None else np.concatenate([flat.types, np.zeros(behind, np.int64)]),
    )


def round_up(flat: Flat) -> Flat:
    """Append filler tokens to a batch, up to a multiple of `TILE` tokens, for half precision on CPU.

    oneDNN compiles a kernel for each number of tokens, which takes longer than a small product, and keeps 1,024 of
    them. With batches of any length, it would keep discarding kernels and compiling them again.
    """
    tokens = -(-len(flat.ids) // TILE) * TILE
    return flat if tokens == len(flat.ids) else fill(flat, tokens, len(flat.bounds), max(flat.longest, TILE))


def room(flat: Flat, tokens: int, texts: int, longest: int) -> bool:
    """Whether `fill` can extend a batch to this shape."""
    filler = -(-(tokens - len(flat.ids)) // longest)
    return len(flat.ids) <= tokens and len(flat.bounds) - 1 + filler <= texts and flat.longest <= longest


def features(flat: Flat, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Copy a batch to the device, as the features that sentence-transformers' modules take.

    Args:
        dtype: of the weights.
    """
    bounds = torch.from_numpy(flat.bounds).to(device)
    layout: Tiles | Spans = Spans(bounds, flat.longest)
    if device.type == "cpu":
        layout = tiling.tiles(flat.bounds, flat.place, len(flat.ids), dtype)
    return as_features([torch.from_numpy(row).to(device) for row in flat.rows()], bounds, layout)


def as_features(rows: Sequence[torch.Tensor], bounds: torch.Tensor, layout: Tiles | Spans) -> dict[str, Any]:
    """The features of a batch that is on the device; its tensors get a batch dimension of one.

    Args:
        rows: `Flat.rows`, each (tokens,) int64.
        bounds: (texts + 1,) int32.
    """
    names = ("input_ids", "position_ids", "seq_idx", "token_type_ids")
    return {
        **{name: row[None] for name, row in zip(names, rows, strict=False)},
        "cu_seq_lens_q": bounds,
        # transformers uses a mask of four dimensions unchanged. Else it would build an unused one of tokens x tokens.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=bounds.device),
        "layout": layout,
    }


def first_position(model: torch.nn.Module) -> int:
    """The position that a model gives to a first token: behind the padding index in models like RoBERTa, else 0."""
    for module in model.modules():
        padding_idx = getattr(module, "padding_idx", None)
        table = getattr(module, "position_embeddings", None)
        if isinstance(padding_idx, int) and isinstance(table, torch.nn.Embedding):
            return padding_idx + 1
    return 0


def install(model: Any) -> str | None:
    """Make a transformers model call `attend`, also for padded batches.

    Returns:
        None, or why the model cannot do so; it is then unchanged.
    """
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa":
        return f"its attention is {before!r}, and only 'sdpa' can be replaced"
    if not getattr(model, "is_backend_compatible", lambda: False)():
        return "its attention cannot be replaced"
    model.set_attn_implementation(IMPLEMENTATION)
    return None


def give_heads_first_tokens(model: Any) -> None:
    """Give the layers behind an encoder, such as the classifier of a cross-encoder, the first token of each text.

    They read the first token of each row, and a batch without padding is one row. Padded batches stay as they are.
    """
    if model.base_model is not model:
        model.base_model.register_forward_hook(_first_tokens, with_kwargs=True)


def _first_tokens(encoder: torch.nn.Module, _: tuple[Any, ...], features: dict[str, Any], output: Any) -> Any:
    if features.get("layout") is not None:
        tokens = output.last_hidden_state[0]  # (tokens, hidden)
        output.last_hidden_state = tokens.index_select(0, features["cu_seq_lens_q"][:-1])[:, None]  # (texts, 1, hidden)
        pooler = getattr(encoder, "pooler", None)
        if pooler is not None:
            output.pooler_output = pooler(output.last_hidden_state)
    return output


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Tiles | Spans | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a padded batch, or over concatenated texts.

    Args:
        query, key, value: (1, heads, tokens, head_dim); key and value may have fewer heads.
        layout: the places of the texts; None if the batch is padded, for which transformers' own attention runs.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        NotImplementedError: the layer needs something that the unpadded form lacks (a bias, a cap, a causal window).
    """
    if layout is None:
        sdpa = AttentionInterface._global_mapping["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    is_causal, reach = _visible(module, options)
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))  # (tokens, heads, head_dim)
    if isinstance(layout, Tiles):
        return tiling.attend(q, k, v, *layout, scaling, is_causal, reach)[None], None
    return _attend_flash(q, k, v, layout, scale=scaling, is_causal=is_causal, reach=reach)[None], None


def _visible(module: torch.nn.Module, options: dict[str, Any]) -> tuple[bool, int | None]:
    """Which tokens of its text a token sees, by the options of an attention layer.

    Returns:
        Whether it sees only itself and the tokens before it; how many tokens to either side it sees, None for all.

    Raises:
        NotImplementedError: as `attend`.
    """
    for name in ("position_bias", "softcap", "s_aux", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"unpadded attention has no {name}")
    is_causal = bool(getattr(module, "is_causal", False) if options.get("is_causal") is None else options["is_causal"])
    if options.get("sliding_window") is None:
        return is_causal, None
    if is_causal:
        raise NotImplementedError("unpadded attention has no causal window")
    return False, options["sliding_window"] - 1


def _attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    *,
    scale: float | None,
    is_causal: bool,
    reach: int | None,
) -> torch.Tensor:
    """The attention of tiling.attend by torch's variable-length flash attention, on CUDA in half precision."""
    from torch.nn.attention.varlen import varlen_attn

    unusual: dict[str, Any] = {}
    if is_causal or reach is not None:
        unusual["window_size"] = (-1, 0) if reach is None else (reach, reach)
    if query.shape[1] != key.shape[1]:
        unusual["enable_gqa"] = True
    mixed = varlen_attn(
        query,
        key,
        value,
        spans.bounds,
        spans.bounds,
        spans.longest,
        spans.longest,
        scale=scale,
        **unusual,
    )
    return cast(torch.Tensor, mixed)
