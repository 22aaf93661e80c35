"""A recorded forward gives the vectors of the model's modules for any batch, or it is not used."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.embedding.local import unpadded
from deployments.embedding.local.model import LocalModel
from deployments.embedding.local.packed import available, pack_linears
from deployments.embedding.local.recorded import NotRecordable, Recorded
from deployments.embedding.model import Tokens
from tests.repetitions import repetitions

Features = dict[str, Any]

CPU = torch.device("cpu")
LENGTHS = [[3, 40, 9], [1], [16], [5, 6, 7, 33]]


def features_of(lengths: list[int], dtype: torch.dtype = torch.float32) -> Features:
    texts = [Tokens([1000 * text + place for place in range(length)]) for text, length in enumerate(lengths)]
    return unpadded.features(unpadded.flatten(texts, 0), CPU, dtype)


def mean_of_ids(features: Features) -> torch.Tensor:
    """A forward for tests: the mean token id of each text, (texts, 1)."""
    lengths = features["cu_seq_lens_q"].diff()
    sums = torch.zeros(lengths.shape[0]).index_add(0, features["seq_idx"][0], features["input_ids"][0].float())
    return (sums / lengths)[:, None]


CHAINS = [
    ("bert", "mean"),
    ("bert", "max"),
    ("distilbert", "cls"),
    ("electra", "mean"),
    ("modernbert", "cls"),
    ("nomic", "mean"),
    ("qwen", "lasttoken"),
    ("roberta", "weightedmean"),
]


@pytest.mark.parametrize(
    ("kind", "pooling", "dtype"),
    [
        pytest.param(*chain, dtype, marks=[pytest.mark.slow] if (number + half) % 2 else [])
        for half, dtype in enumerate(("float32", "bfloat16"))
        for number, chain in enumerate(CHAINS)
    ],
)
async def test_a_recording_gives_the_vectors_of_the_model_bit_for_bit(
    tiny: Callable[..., Path], kind: str, pooling: str, dtype: str
) -> None:
    model = LocalModel(str(tiny(kind, pooling, "dense", "normalize")), device="cpu", dtype=dtype)
    recorded = model._forward._recorded
    assert recorded is not None
    random = np.random.default_rng(3)
    for texts in [1, 1, 2, 3, 5, 8, 13, 40]:
        batch = [Tokens(random.integers(1000, 30_000, random.integers(1, 65)).tolist()) for _ in range(texts)]
        model._forward._recorded = recorded
        ours = await model.forward(batch)
        model._forward._recorded = None
        assert np.array_equal(ours, await model.forward(batch))
    await model.close()


async def test_a_recording_can_run_in_several_threads_at_once(tiny: Callable[..., Path]) -> None:
    model = LocalModel(str(tiny("bert")), device="cpu", dtype="float32", num_threads=1)
    random = np.random.default_rng(4)
    batches = [
        [Tokens(random.integers(1000, 30_000, random.integers(1, 65)).tolist()) for _ in range(texts)]
        for texts in random.integers(1, 12, 40)
    ]
    alone = [await model.forward(batch) for batch in batches]
    together = await asyncio.gather(*(model.forward(batch) for batch in batches))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
    await model.close()


def test_a_forward_that_treats_all_batches_alike_is_recorded() -> None:
    recorded = Recorded(mean_of_ids, [], [features_of(lengths) for lengths in LENGTHS])
    features = features_of([2, 7, 50, 50, 1])
    assert torch.equal(recorded(features), mean_of_ids(features))


def by_value(features: Features) -> torch.Tensor:
    return mean_of_ids(features) * (2 if features["input_ids"].max() > 5000 else 1)


def by_size(features: Features) -> torch.Tensor:
    return mean_of_ids(features) * (2 if features["input_ids"].shape[1] > 5000 else 1)


def by_number_of_texts(features: Features) -> torch.Tensor:
    return mean_of_ids(features) / len(features["cu_seq_lens_q"])


def by_a_copy(features: Features) -> torch.Tensor:
    return mean_of_ids(features) + torch.from_numpy(features["position_ids"].numpy()).max()


def by_failing(features: Features) -> torch.Tensor:
    raise ValueError("This model\nis not well.")


def by_failing_later(features: Features) -> torch.Tensor:
    return mean_of_ids(features) + features["input_ids"].narrow(1, 0, 5).sum() * 0  # one sample has fewer tokens


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (by_value, "Converting a tensor to a Python boolean"),
        (by_size, "Converting a tensor to a Python boolean"),
        (by_number_of_texts, "Using len to get tensor shape"),
        (by_a_copy, "Converting a tensor to a NumPy array"),
        (by_failing, "This model$"),
        (by_failing_later, r"start \(0\) \+ length \(5\) exceeds dimension size \(1\)"),
    ],
)
def test_a_forward_that_decides_by_the_batch_is_refused(
    forward: Callable[[Features], torch.Tensor], reason: str
) -> None:
    """The first two give the same vectors for all batches that are compared: only torch's warnings show them."""
    with pytest.raises(NotRecordable, match=rf"^{reason}[^\n]*$"):
        Recorded(forward, [], [features_of(lengths) for lengths in LENGTHS])


def test_no_warning_is_lost_while_other_threads_run() -> None:
    """When warnings were raised as errors inside operators, one in 17 was lost; in a quiet process, one in 10,000."""
    ended, interval = threading.Event(), sys.getswitchinterval()

    def work() -> None:
        while not ended.is_set():
            list(range(50))

    threads = [threading.Thread(target=work) for _ in range(2)]
    samples = [features_of(lengths) for lengths in LENGTHS]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(repetitions(150, quick=40)):
            with pytest.raises(NotRecordable, match=r"^Converting a tensor to a NumPy array"):
                Recorded(by_a_copy, [], samples)
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        for thread in threads:
            thread.join()


async def test_the_error_of_an_operator_is_reported_in_one_line(tiny: Callable[..., Path]) -> None:
    model = LocalModel(str(tiny("bert")), device="cpu", dtype="float32")
    assert model._forward._recorded is not None
    with pytest.raises(RuntimeError, match=r"^index out of range in self$"):
        await model.forward([Tokens([40_000])])
    await model.close()


def test_packed_layers_are_recorded_with_their_own_weights() -> None:
    if not available(torch.bfloat16):
        pytest.skip("this CPU has no bfloat16 matrix product")
    network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Linear(8, 4)).to(torch.bfloat16).requires_grad_(False)
    packed = pack_linears(network)
    assert len(packed) == 2

    def forward(features: Features) -> torch.Tensor:
        out = network(mean_of_ids(features).to(torch.bfloat16))
        assert isinstance(out, torch.Tensor)
        return out

    samples = [features_of(lengths, torch.bfloat16) for lengths in LENGTHS]
    features = features_of([2, 7, 50, 50, 1], torch.bfloat16)
    recorded = Recorded(forward, packed, samples)
    assert torch.equal(recorded(features), forward(features))
    with pytest.raises(NotRecordable, match="Tensor"):  # the weight of the second layer is no argument
        Recorded(forward, packed[:1], samples)


async def test_a_model_that_cannot_be_recorded_runs_unrecorded(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny("bert"))
    batch = [Tokens([1000, 1001, 1002]), Tokens([1003])]
    model = LocalModel(folder, device="cpu", dtype="float32")
    expected = await model.forward(batch)
    await model.close()

    def refuse(*_: Any) -> None:
        raise NotRecordable("it looks at a size")

    monkeypatch.setattr("deployments.embedding.local.forward.Recorded", refuse)
    caplog.set_level("INFO", "memserve.embedding")
    model = LocalModel(folder, device="cpu", dtype="float32", name="a-model")
    assert model._forward._recorded is None
    assert "a-model runs without a recording: it looks at a size" in caplog.text
    assert np.array_equal(await model.forward(batch), expected)
    await model.close()
