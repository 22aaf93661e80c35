"""How much of an input a local model reads, and tokenizers that cut it to that."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from deployments.embedding.local import unpadded
from deployments.embedding.model import InputType, Truncate
from deployments.errors import ModelUnavailable


def longest_inputs(network: Any) -> dict[InputType | None, int]:
    """Tokens of the longest query, document and other input, special tokens included.

    As sentence-transformers has it, a length of a type's own may be more than that of the others. None is more than the
    model has positions for.

    Raises:
        ModelUnavailable: the model does not say; some tokenizers have no limit of their own.
    """
    first = network[0]
    positions = getattr(first.model.config, "max_position_embeddings", None)
    if positions:
        positions -= unpadded.first_position(first.model)  # the places in the table before it are no token's
    always = (first.processing_kwargs.get("text") or {}).get("max_length")
    usual = always or network.max_seq_length or positions
    if not usual:
        raise ModelUnavailable("The model does not say how long an input may be: set model.max_tokens in its folder.")
    asked: dict[InputType | None, int] = {
        None: usual,
        "query": always or first.query_length or usual,
        "document": always or first.document_length or usual,
    }
    return {input_type: int(min(length, positions or length)) for input_type, length in asked.items()}


def tokenizer(own: Any, truncate: Truncate = "none", limit: int = 0) -> Tokenizer:
    """A copy of a model's own tokenizer that does not pad: how it truncates is state of the object.

    Args:
        own: the model's, of the library tokenizers.
        truncate: the end that is cut off.
        limit: tokens that are left.
    """
    made = Tokenizer.from_str(own.to_str())
    made.no_padding()
    made.no_truncation()
    if truncate != "none":
        made.enable_truncation(limit, direction="right" if truncate == "end" else "left")
    return made
