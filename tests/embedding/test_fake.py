"""The fake model: it is deterministic, and texts that share words are closer."""

from __future__ import annotations

import numpy as np

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.fake import FakeModel


async def test_vectors_are_deterministic_of_length_one_and_closer_with_shared_words() -> None:
    engine = Engine(FakeModel(dim=64))
    answer = await engine.embed_one(EmbedRequest(["a red fox", "the red fox", "quarterly results"]))
    again = await Engine(FakeModel(dim=64)).embed_one(EmbedRequest(["a red fox"]))
    assert np.array_equal(answer.vectors[0], again.vectors[0])
    assert np.allclose(np.linalg.norm(answer.vectors, axis=1), 1, atol=1e-6)  # float32 rounding
    near, far = answer.vectors[0] @ answer.vectors[1], answer.vectors[0] @ answer.vectors[2]
    assert near > far + 0.3


async def test_its_tokens_have_character_offsets() -> None:
    model = FakeModel()
    tokens = (await model.split(["a cat a"]))[0]
    assert [(token["text"], token["start"], token["stop"]) for token in tokens] == [
        ("a", 0, 1),
        ("cat", 2, 5),
        ("a", 6, 7),
    ]
    assert tokens[0]["id"] == tokens[2]["id"] != tokens[1]["id"]
    assert await model.decode([[3, 4]]) == ["<3> <4>"]
    special = model.info.vocab_size - 1
    assert await model.decode([[special, 4]]) == ["<4>"]
    assert await model.decode([[special, 4]], skip_special_tokens=False) == [f"<{special}> <4>"]
