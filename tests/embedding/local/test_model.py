"""The vectors of a local model are those of `SentenceTransformer.encode`."""

from __future__ import annotations

import hashlib
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from deployments.embedding.engine import EmbedRequest, Engine
from deployments.embedding.load import load_model
from deployments.embedding.local.model import LocalModel
from deployments.embedding.local.spec import choose_dtype
from deployments.embedding.model import Tokens
from deployments.errors import InvalidRequest, ModelUnavailable
from tests.repetitions import repetitions

Sentences = Callable[..., list[str]]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def encoder(folder: Path, dtype: torch.dtype = torch.float32) -> SentenceTransformer:
    """The model as sentence-transformers loads it: the reference."""
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": dtype}).to(
        dtype
    )


async def vectors_of(model: LocalModel, texts: list[str], prompt: str = "") -> np.ndarray:
    tokens = await model.tokenize(texts, prompt, "end")
    return await model.forward([one for one in tokens if isinstance(one, Tokens)])


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.sum(ours * theirs, axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)


def chains() -> list[Any]:
    """All chains of modules. `make unit` has each family, each pooling and each module."""
    found = []
    for k, kind in enumerate(("bert", "roberta", "modernbert", "mpnet")):
        for p, pooling in enumerate(("mean", "cls", "max")):
            for m, more in enumerate(((), ("dense",), ("normalize",), ("dense", "normalize"))):
                marks = [pytest.mark.slow] if (p, m) != (k % 3, k) else []
                found.append(pytest.param(kind, pooling, more, marks=marks, id="-".join((kind, pooling, *more))))
    return found


@pytest.mark.parametrize(("kind", "pooling", "more"), chains())
async def test_every_chain_of_modules_gives_the_vectors_of_encode(
    sentences: Sentences, tiny: Callable[..., Path], kind: str, pooling: str, more: tuple[str, ...]
) -> None:
    folder = tiny(kind, pooling, *more)
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    texts = sentences(40, seed=1, longest=90)  # some are longer than the model reads
    ours, theirs = await vectors_of(model, texts), encoder(folder).encode(texts)
    assert ours.shape == theirs.shape == (40, 24 if "dense" in more else 32)
    assert ours.dtype == np.float32 and ours.flags["C_CONTIGUOUS"]
    assert np.abs(ours - theirs).max() <= 1e-5
    assert model.pads == (kind == "mpnet")  # its attention has a bias, which the unpadded form lacks
    await model.close()


@pytest.mark.parametrize(
    ("kind", "pooling", "why_padded"),
    [
        ("deberta", "mean", "its attention is 'eager', and only 'sdpa' can be replaced"),
        ("distilbert", "mean", None),
        ("electra", "cls", None),
        ("nomic", "mean", None),
        ("qwen", "lasttoken", None),
        ("roberta", "weightedmean", None),
    ],
)
async def test_other_families_give_the_vectors_of_encode(
    sentences: Sentences,
    tiny: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    *,
    kind: str,
    pooling: str,
    why_padded: str | None,
) -> None:
    caplog.set_level("INFO", "memserve.embedding")
    folder = tiny(kind, pooling, "normalize")
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    texts = sentences(30, seed=8, longest=90)
    assert np.abs(await vectors_of(model, texts) - encoder(folder).encode(texts)).max() <= 1e-5
    assert model.pads == (why_padded is not None)
    told = [record.getMessage() for record in caplog.records if "with padding" in record.getMessage()]
    assert told == ([] if why_padded is None else [f"{model.info.name} runs with padding: {why_padded}"])
    await model.close()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
async def test_white_space_and_nul_have_the_vectors_of_encode(tiny: Callable[..., Path], kind: str) -> None:
    folder = tiny(kind)
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    texts = [" ", "\n\t", "\0", "green\0tea", " tea "]
    result = await Engine(model).embed_one(EmbedRequest(texts))
    assert np.abs(result.vectors - encoder(folder).encode(texts)).max() <= 1e-5
    await model.close()


def test_a_model_that_is_given_more_than_token_ids_is_refused(tiny: Callable[..., Path]) -> None:
    """GPT-2 adds a vector for the segment of a token. BERT's tokenizer gives segments to `encode`, but not here."""
    with pytest.raises(ModelUnavailable, match=r"gives other vectors here than encode does \(1 - cosine is 0\.\d+\)"):
        LocalModel(str(tiny("gpt2", "lasttoken")), device="cpu", dtype="float32")


async def test_a_lower_limit_of_tokens_is_respected(sentences: Sentences, tiny: Callable[..., Path]) -> None:
    folder = tiny("bert")
    model, reference = LocalModel(str(folder), device="cpu", dtype="float32", max_tokens=5), encoder(folder)
    reference.max_seq_length = 5
    texts = sentences(12, seed=9)
    assert model.info.max_tokens == 5
    assert np.abs(await vectors_of(model, texts) - reference.encode(texts)).max() <= 1e-5
    await model.close()


def changed(folder: Path, into: Path, **more: Any) -> Path:
    """Copy a model and change settings of its first module."""
    shutil.copytree(folder, into)
    settings = into / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))
    return into


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"query_length": 9, "document_length": 70}, (64, 9, 70)),  # of 80 positions, other inputs may use 64
        ({"query_length": 9}, (64, 9, 64)),
        ({"query_length": 9, "processing_kwargs": {"text": {"max_length": 21}}}, (21, 21, 21)),
    ],
)
async def test_queries_and_documents_have_the_lengths_that_encode_gives_them(
    sentences: Sentences,
    tiny: Callable[..., Path],
    tmp_path: Path,
    *,
    settings: dict[str, Any],
    limits: tuple[int, int, int],
    include_prompt: bool,
) -> None:
    folder = changed(tiny("bert", "mean", include_prompt=include_prompt), tmp_path / "changed", **settings)
    model, reference = LocalModel(str(folder), device="cpu", dtype="float32"), encoder(folder)
    assert (model.info.max_tokens, model.info.limit("query"), model.info.limit("document")) == limits
    texts = [*sentences(20, seed=10), "a " * 90]
    engine = Engine(model)
    plain, query, document = [
        await engine.embed_one(EmbedRequest(texts, prompt, input_type=input_type))
        for prompt, input_type in (("", None), ("search query: ", "query"), ("", "document"))  # type: ignore[arg-type]
    ]
    assert np.abs(plain.vectors - reference.encode(texts)).max() <= 1e-5
    assert np.abs(query.vectors - reference.encode_query(texts)).max() <= 1e-5
    assert np.abs(document.vectors - reference.encode_document(texts)).max() <= 1e-5
    assert tuple(int(one.tokens.max()) for one in (plain, query, document)) == limits
    whole = len(model._tokenizers.whole.encode("a " * 90))
    for input_type, limit in zip((None, "query", "document"), limits, strict=True):
        for way in ("end", "start"):
            (cut,) = await model.tokenize([[7] * 90], "", way, input_type)  # type: ignore[arg-type]
            assert isinstance(cut, Tokens) and len(cut) == limit and cut.truncated
        with pytest.raises(InvalidRequest) as refused:
            await engine.embed_one(EmbedRequest(["a " * 90], truncate="none", input_type=input_type))  # type: ignore[arg-type]
        assert refused.value.position == 0
        known = min(whole, 4 * limit + 1)  # of eight characters for each token of the limit
        assert refused.value.message == f"has at least {known} tokens; the model reads at most {limit}"
    await model.close()


async def test_no_limit_exceeds_the_number_of_positions(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """`encode_document` fails on such texts."""
    folder = changed(tiny("roberta"), tmp_path / "changed", document_length=500)
    model = LocalModel(str(folder), device="cpu", dtype="float32", max_tokens=70)
    assert (model.info.max_tokens, model.info.limit("document")) == (64, 70)
    await model.close()
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    assert (model.info.max_tokens, model.info.limit("document")) == (64, 79)
    (tokens,) = await model.tokenize(["a " * 90], "", "end", "document")
    assert isinstance(tokens, Tokens) and len(tokens) == 79
    assert np.isfinite(await model.forward([tokens])).all()
    await model.close()


def test_a_model_that_fills_up_its_queries_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(tiny("bert"), tmp_path / "changed", query_expansion={"strategy": "fixed", "length": 16})
    with pytest.raises(ModelUnavailable, match="pads queries with mask tokens, which is not supported"):
        LocalModel(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("include_prompt", [True, False])
async def test_prompts_are_pooled_as_by_encode(
    sentences: Sentences, tiny: Callable[..., Path], pooling: str, include_prompt: bool
) -> None:
    folder = tiny("bert", pooling, include_prompt=include_prompt)
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    texts, reference = sentences(12, seed=2), encoder(folder)
    assert model.info.prompts == {"query": "search query: ", "document": ""}
    for name in ("query", "document"):
        ours = await vectors_of(model, texts, model.info.prompts[name])
        assert np.abs(ours - reference.encode(texts, prompt_name=name)).max() <= 1e-5
    # In one batch with texts that have no prompt.
    mixed = await model.tokenize(texts, "search query: ", "end") + await model.tokenize(texts, "", "end")
    ours = await model.forward([one for one in mixed if isinstance(one, Tokens)])
    assert np.abs(ours[:12] - reference.encode(texts, prompt_name="query")).max() <= 1e-5
    assert np.abs(ours[12:] - reference.encode(texts)).max() <= 1e-5
    await model.close()


@pytest.mark.parametrize(("kind", "limit"), [("roberta", 79), ("mpnet", 78)])
async def test_if_positions_start_behind_the_padding_index_fewer_tokens_fit(
    tiny: Callable[..., Path], kind: str, limit: int
) -> None:
    """The table has 80 entries. sentence-transformers takes 80 for the limit, and fails on texts of that length."""
    folder = tiny(kind, longest=None)
    model, reference = LocalModel(str(folder), device="cpu", dtype="float32"), encoder(folder)
    assert (reference.max_seq_length, model.info.max_tokens) == (80, limit)
    assert model.pads == (kind == "mpnet")
    await model.warm_up(1024, 1)
    reference.max_seq_length = limit
    assert np.abs(await vectors_of(model, ["a " * 90]) - reference.encode(["a " * 90])).max() <= 1e-5
    await model.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_text_that_overflows_spoils_no_other(tiny: Callable[..., Path], tmp_path: Path, dtype: str) -> None:
    """Texts share rows of the attention, and a bias does not hide a number that is not finite."""
    network = encoder(tiny("bert"))
    poison, *good = network.tokenizer.convert_tokens_to_ids(["poison", "one", "two", "three", "four"])
    network[0].model.embeddings.word_embeddings.weight.data[poison] = torch.nan
    network.save(str(tmp_path / "model"))
    model = LocalModel(str(tmp_path / "model"), device="cpu", dtype=dtype)
    assert not model.pads
    others = [Tokens(good[: 1 + length % 4] * (1 + length % 5)) for length in range(12)] + [Tokens(good * 10)]
    alone = np.concatenate([await model.forward([one]) for one in others])
    together = await model.forward([Tokens([poison]), *others, Tokens([*good, poison])])
    assert np.isnan(together[[0, -1]]).all()
    assert cosines(together[1:-1], alone).min() > 1 - (1e-6 if dtype == "float32" else 1e-3)
    await model.close()


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet"])
async def test_a_padding_token_within_a_text_has_the_position_that_encode_gives_it(
    tiny: Callable[..., Path], kind: str
) -> None:
    folder = tiny(kind)
    model = LocalModel(str(folder), device="cpu", dtype="float32")
    texts = ["a [PAD] b c", "[PAD]", "one two three", "[PAD] [PAD] four [PAD] five"]
    assert np.abs(await vectors_of(model, texts) - encoder(folder).encode(texts)).max() <= 1e-5
    await model.close()


async def test_a_batch_filled_up_to_a_fixed_shape_gives_the_same_vectors(
    sentences: Sentences, tiny: Callable[..., Path]
) -> None:
    """CUDA graphs replay such batches: filler texts follow the batch, empty texts precede it."""
    from deployments.embedding.local import unpadded

    for pooling in ("mean", "cls", "max"):
        model = LocalModel(str(tiny("roberta", pooling)), device="cpu", dtype="float32")
        tokens = [one for one in await model.tokenize(sentences(9, seed=3), "", "end") if isinstance(one, Tokens)]
        flat = unpadded.flatten(tokens, model._forward._spec.first_position)
        exact = await model.forward(tokens)
        used = len(flat.ids)
        for size, texts, longest in ((used, 9, 64), (used + 1, 12, 64), (used + 200, 40, 64)):
            assert unpadded.room(flat, size, texts, longest)
            bounded = unpadded.fill(flat, size, texts, longest)
            assert bounded.ids.shape == bounded.positions.shape == bounded.text_of.shape == (size,)
            assert bounded.bounds.shape == (texts + 1,) and np.diff(bounded.bounds).max() <= longest
            with torch.inference_mode():
                features = unpadded.features(bounded, torch.device("cpu"), torch.float32)
                filled = model._forward._vectors(features).numpy()[bounded.place]
            assert np.abs(filled - exact).max() <= 2e-6
        assert not unpadded.room(flat, used - 1, 40, 64)
        assert not unpadded.room(flat, used + 200, 9, 64)
        await model.close()


@pytest.fixture(scope="module")
def minilm() -> LocalModel:
    model = load_model("local", device="cpu", dtype="float32", num_threads=1)
    assert isinstance(model, LocalModel)
    return model


@pytest.mark.parametrize("kind", ["bert", "mpnet"])  # without padding, and with it
async def test_a_forward_that_ran_out_of_memory_frees_its_activations_before_the_halves_run(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = LocalModel(str(tiny(kind)), device="cpu", dtype="float32")
    made: list[weakref.ref[torch.Tensor]] = []
    freed: list[bool] = []

    def forward(features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        activation = features["input_ids"] + 1
        made.append(weakref.ref(activation))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(made[0]() is None))
    monkeypatch.setattr(model._forward, "_vectors", forward)
    with pytest.raises(torch.OutOfMemoryError):
        await model.forward([Tokens([1, 2, 3])])
    assert freed == [True]
    await model.close()


@pytest.mark.parametrize(("code", "lost"), [(2, None), (700, "CUDA error: as the driver said")])
async def test_the_device_is_not_lost_if_the_driver_is_out_of_memory(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, code: int, lost: str | None
) -> None:
    """2 is cudaErrorMemoryAllocation, after which the context can be used; 700 is cudaErrorIllegalAddress."""
    model = LocalModel(str(tiny("bert")), device="cpu", dtype="float32")

    def forward(features: dict[str, Any], prompt_tokens: int = 0) -> torch.Tensor:
        error = torch.AcceleratorError("CUDA error: as the driver said\nand more")
        error.error_code = code  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(model._forward, "_vectors", forward)
    with pytest.raises(torch.AcceleratorError):
        await model.forward([Tokens([1, 2, 3])])
    assert model.lost == lost
    await model.close()


def test_the_packaged_weights_are_the_published_ones(minilm_folder: Path) -> None:
    assert hashlib.sha256((minilm_folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256


async def test_minilm_in_float32_gives_the_vectors_of_encode(
    sentences: Sentences, minilm: LocalModel, minilm_folder: Path
) -> None:
    texts = sentences(repetitions(48, quick=12), seed=4, longest=200)
    ours = await vectors_of(minilm, texts)
    assert not minilm.pads
    assert np.abs(ours - encoder(minilm_folder).encode(texts)).max() <= 1e-5
    info = minilm.info
    assert (info.name, info.dim, info.max_tokens, info.vocab_size) == ("all-MiniLM-L6-v2", 384, 256, 30522)
    assert (info.device, info.dtype, info.revision) == ("cpu", "float32", "e409ba3376d570a8-float32")


async def test_the_vector_of_a_text_is_the_same_in_any_batch(
    sentences: Sentences, tiny: Callable[..., Path], minilm: LocalModel
) -> None:
    """Up to float32 rounding, in many random batches of a small model and some of the large one."""
    random = np.random.default_rng(5)
    small = LocalModel(str(tiny("bert", "mean", "normalize")), device="cpu", dtype="float32")
    for model, batches in ((small, repetitions(1_000, quick=150)), (minilm, repetitions(20, quick=3))):
        pool = [one for one in await model.tokenize(sentences(200, seed=6), "", "end") if isinstance(one, Tokens)]
        probe = pool[0]
        alone = (await model.forward([probe]))[0]
        for _ in range(batches):
            size = int(random.integers(1, 24))
            batch = [pool[index] for index in random.integers(0, len(pool), size)]
            place = int(random.integers(0, size + 1))
            batch.insert(place, probe)
            assert np.abs((await model.forward(batch))[place] - alone).max() <= 2e-6
    await small.close()


@pytest.mark.slow
async def test_vectors_normalised_in_half_precision_have_length_one(sentences: Sentences, minilm_folder: Path) -> None:
    """The squared lengths that `encode` gives range from 0.993 to 1.008."""
    model = LocalModel(str(minilm_folder), device="cpu", dtype="bfloat16")
    assert np.abs(np.linalg.norm(await vectors_of(model, sentences(60, seed=3)), axis=1) - 1).max() < 1e-6
    await model.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_minilm_in_half_precision_keeps_its_direction(
    sentences: Sentences, minilm_folder: Path, dtype: str
) -> None:
    model = LocalModel(str(minilm_folder), device="cpu", dtype=dtype)
    texts = sentences(32, seed=7, longest=120)
    ours = await vectors_of(model, texts)
    assert cosines(ours, encoder(minilm_folder).encode(texts)).min() >= 0.9999
    await model.close()


@pytest.mark.parametrize("kind", ["modernbert", "nomic", "qwen"])
async def test_rotary_frequencies_are_not_rounded(tiny: Callable[..., Path], kind: str) -> None:
    """If rounded to bfloat16, the cosines of angles are off by up to 0.15 at token 512 (Qwen3), by 1.3 at 8,000."""
    folder = tiny(kind, "mean", "dense")
    model = LocalModel(str(folder), device="cpu", dtype="bfloat16")
    loaded = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).named_buffers()
    frequencies = {name: buffer for name, buffer in loaded if "inv_freq" in name}
    ours = dict(model._forward._network.named_buffers())
    assert frequencies and all(torch.equal(ours[name], buffer) for name, buffer in frequencies.items())
    assert {weights.dtype for weights in model._forward._network.parameters()} == {torch.bfloat16}
    await model.close()


def test_dtype_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, amx, expected in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=bf16: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        assert choose_dtype("auto", "cpu") is expected
    for in_hardware, expected in ((True, torch.bfloat16), (False, torch.float32)):
        # Cards from before 2020 only emulate it.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=in_hardware: answer)
        assert choose_dtype("auto", "cuda:0") is expected
        assert choose_dtype("float16", "cuda:0") is torch.float16


async def test_truncation_keeps_the_special_tokens_and_the_requested_end(minilm: LocalModel) -> None:
    words = [f"w{index}" for index in range(300)]
    full = (await minilm.tokenize([" ".join(words)], "", "none"))[0]
    assert isinstance(full, int) and full > 256
    end, start = [(await minilm.tokenize([" ".join(words)], "", way))[0] for way in ("end", "start")]
    assert isinstance(end, Tokens) and isinstance(start, Tokens)
    everything = minilm._tokenizers.whole.encode(" ".join(words)).ids
    assert end == Tokens([*everything[:255], everything[-1]], 0, True)
    assert start == Tokens([everything[0], *everything[-255:]], 0, True)
    exact = (await minilm.tokenize(["a " * 254], "", "end"))[0]
    assert isinstance(exact, Tokens) and len(exact) == 256 and not exact.truncated


async def test_pooling_leaves_out_only_what_truncation_left_of_the_prompt(tiny: Callable[..., Path]) -> None:
    model = LocalModel(str(tiny("bert", "mean", include_prompt=False)), device="cpu", dtype="float32")
    for words, leading in ((59, 4), (60, 3), (61, 2), (70, 1)):  # the prompt has 4 tokens with [CLS], the limit is 64
        (tokens,) = await model.tokenize(["a " * words], "search query: ", "start")
        assert isinstance(tokens, Tokens)
        assert (tokens.prompt_tokens, tokens.truncated) == (leading, leading < 4)
    await model.close()


async def test_token_ids_are_used_verbatim(minilm: LocalModel) -> None:
    ids = list(minilm._tokenizers.whole.encode("a cat sat").ids)
    engine = Engine(minilm)
    as_text, as_ids, bare = await engine.embed(
        [EmbedRequest(["a cat sat"]), EmbedRequest([ids], prompt="ignored "), EmbedRequest([ids[1:-1]])]
    )
    assert not isinstance(as_text, Exception) and not isinstance(as_ids, Exception) and not isinstance(bare, Exception)
    assert np.abs(as_text.vectors - as_ids.vectors).max() <= 2e-6
    assert np.abs(as_text.vectors - bare.vectors).max() > 1e-3
    assert (as_ids.tokens.tolist(), bare.tokens.tolist()) == ([5], [3])


async def test_the_ids_of_a_text_give_its_vector_however_long_it_is(minilm: LocalModel) -> None:
    assert (minilm.info.first_ids, minilm.info.last_ids) == ((101,), (102,))
    text = "many words " * 200 + "at the end"
    ids = [token["id"] for token in (await minilm.split([text]))[0]]
    assert (ids[0], len(ids), ids[-1]) == (101, 405, 102)
    for truncate in ("end", "start"):
        ways: tuple[list[str] | list[list[int]], ...] = ([text], [ids])
        (of_text,), (of_ids,) = [await minilm.tokenize(way, "", truncate) for way in ways]  # type: ignore[arg-type]
        assert isinstance(of_text, Tokens) and isinstance(of_ids, Tokens)
        assert of_ids == of_text and len(of_ids) == 256


async def test_tokens_have_character_offsets(minilm: LocalModel) -> None:
    tokens: list[Any] = (await minilm.split(["Cats sat"]))[0]
    assert [(token["text"], token["special"], token["start"], token["stop"]) for token in tokens] == [
        ("[CLS]", True, None, None),
        ("cats", False, 0, 4),
        ("sat", False, 5, 8),
        ("[SEP]", True, None, None),
    ]
    assert [len(one) for one in await minilm.split(["Cats sat"], add_special_tokens=False)] == [2]
    ids = [token["id"] for token in tokens]
    assert await minilm.decode([ids]) == ["cats sat"]
    assert await minilm.decode([ids], skip_special_tokens=False) == ["[CLS] cats sat [SEP]"]


def test_a_folder_that_holds_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable) as unavailable:
        load_model("local", str(tmp_path))
    assert "\n" not in str(unavailable.value) and str(tmp_path) in str(unavailable.value)
