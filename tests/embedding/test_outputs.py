"""The output formats of vectors: dimensions, types, base64; answers between processes; the order of scores."""

from __future__ import annotations

import base64
import pickle

import numpy as np
import pytest

from deployments.embedding.outputs import Answers, EmbedResult, Scores, Timings, cut, quantise, to_base64
from deployments.errors import EmbeddingFailed


def units(count: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cut_keeps_the_first_dimensions_at_length_one() -> None:
    vectors = units(5, 12)
    before = vectors.copy()
    shorter = cut(vectors, 5)
    assert shorter.shape == (5, 5) and shorter.dtype == np.float32 and shorter.flags["C_CONTIGUOUS"]
    assert np.allclose(np.linalg.norm(shorter, axis=1), 1, atol=1e-6)  # float32 rounding
    assert np.allclose(shorter[0] / shorter[0, 0], vectors[0, :5] / vectors[0, 0], rtol=1e-5)
    assert np.array_equal(vectors, before)
    assert cut(vectors, None) is vectors and cut(vectors, 12) is vectors
    assert np.array_equal(cut(np.asarray([[0, 0, 1]], np.float32), 2), [[0, 0]])


@pytest.mark.slow  # imports PyTorch
def test_bits_are_packed_as_sentence_transformers_packs_them() -> None:
    from sentence_transformers.util import quantize_embeddings

    vectors = units(7, 40)
    for precision in ("binary", "ubinary"):
        ours, theirs = quantise(vectors, precision), quantize_embeddings(vectors, precision)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_int8_and_uint8_scale_to_length_one_and_span_minus_one_to_one() -> None:
    vectors = np.asarray([[-1, 0, 0], [0, 0.6, -0.8], [0, 3, 4], [0, 0, 0]], np.float32)
    assert quantise(vectors, "int8").tolist() == [[-127, 0, 0], [0, 76, -102], [0, 76, 102], [0, 0, 0]]
    assert quantise(vectors, "uint8").tolist() == [[1, 128, 128], [128, 204, 26], [128, 204, 230], [128, 128, 128]]
    assert (quantise(vectors, "int8").dtype, quantise(vectors, "uint8").dtype) == (np.int8, np.uint8)
    assert quantise(vectors, "float") is vectors


@pytest.mark.parametrize("length", [1, 0.01, 100])
def test_int8_keeps_the_direction(length: float) -> None:
    """Also that of long and short vectors, which come from models whose last step does not normalise."""
    vectors = units(50, 384)
    bytes_ = quantise(vectors * np.float32(length), "int8").astype(np.float32)
    cosines = np.sum(vectors * bytes_, axis=1) / np.linalg.norm(bytes_, axis=1)
    assert cosines.min() > 0.998  # a step is 1/127; a value of a unit vector of 384 dimensions is about 1/20


def test_base64_is_the_little_endian_rows() -> None:
    vectors = units(3, 8)
    for output_dtype in ("float", "int8", "ubinary"):
        rows = quantise(vectors, output_dtype)  # type: ignore[arg-type]
        for text, row in zip(to_base64(rows), rows, strict=True):
            assert np.array_equal(np.frombuffer(base64.b64decode(text), row.dtype.newbyteorder("<")), row)


def test_the_answers_of_a_call_are_pickled_as_one_matrix() -> None:
    vectors = np.arange(15, dtype=np.float32).reshape(5, 3)
    tokens, truncated = np.array([4, 5, 6, 7, 8], np.int32), np.array([False, True, False, False, True])
    error = EmbeddingFailed("no", None, None, 1)
    parts = [(slice(0, 2), Timings(0.1, 0.2, 0.3)), (slice(2, 5), Timings(0.4, 0.5, 0.6))]
    first, second = (EmbedResult(vectors[part], tokens[part], truncated[part], timings) for part, timings in parts)
    answers = Answers([first, error, second])
    pickled = pickle.dumps(answers, protocol=5)
    assert len(pickled) < len(pickle.dumps([first, error, second], protocol=5))
    one, failed, two = pickle.loads(pickled)
    assert (type(failed), str(failed), failed.position) == (EmbeddingFailed, str(error), 1)
    for found, (part, timings) in zip((one, two), parts, strict=True):
        assert found.vectors.tolist() == vectors[part].tolist() and found.vectors.dtype == np.float32
        assert found.vectors.flags["C_CONTIGUOUS"]
        assert found.tokens.tolist() == tokens[part].tolist() and found.tokens.dtype == np.int32
        assert found.truncated.tolist() == truncated[part].tolist()
        assert found.timings == timings
    assert type(pickle.loads(pickled)) is list
    (only,) = pickle.loads(pickle.dumps(Answers([error])))
    assert isinstance(only, EmbeddingFailed)
    assert pickle.loads(pickle.dumps(Answers())) == []


def test_texts_are_sorted_by_score_then_by_logit_then_by_position() -> None:
    none = np.zeros(5, np.int32)
    scores, logits = np.array([0.5, 1, 1, 0.5, 1], np.float32), np.array([0, 17, 18, 0, 17], np.float32)
    assert Scores(scores, logits, none, none, Timings(0, 0, 0)).order() == [2, 1, 4, 0, 3]
