"""The requirements that are read from a loaded model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.embedding.local.spec import longest_inputs
from deployments.errors import ModelUnavailable


def network(max_seq_length: int | None, positions: int | None, **lengths: int | None) -> Any:
    """The parts of a loaded model that determine how long its inputs may be."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=positions)  # type: ignore[assignment]
    first = SimpleNamespace(
        model=model, processing_kwargs={}, query_length=lengths.get("query"), document_length=lengths.get("document")
    )

    class Network(list[Any]):
        pass

    made = Network([first])
    made.max_seq_length = max_seq_length  # type: ignore[attr-defined]
    return made


def test_no_input_is_longer_than_the_model_has_positions() -> None:
    assert longest_inputs(network(None, 80)) == {None: 80, "query": 80, "document": 80}
    assert longest_inputs(network(64, 80, document=500)) == {None: 64, "query": 64, "document": 80}
    assert longest_inputs(network(64, None, query=9)) == {None: 64, "query": 9, "document": 64}


def test_a_model_without_a_limit_of_its_inputs_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="set max_seq_length in its sentence_bert_config"):
        longest_inputs(network(None, None))
