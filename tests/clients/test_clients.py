"""Other projects' clients, as they are, against a live memserve: what they send, and the vectors that they get.

The vectors must be those of sentence-transformers. Each client has its own packages (environments.py) and runs in a
process of its own (programs/). What it sends is recorded on the way (recorder.py).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from deployments.embedding.load import DEFAULT_MODEL, resolve
from tests.clients import environments
from tests.clients.environments import Unreachable
from tests.clients.recorder import Recorder, Request
from tests.cluster.server import Server
from tests.docs.blocks import CLIENTS_PAGE, differences, examples

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]

ARGS = {
    "model": {"dtype": "float32"},
    "embedder": {"num_cpus": 0.6},
    "store": {"num_cpus": 0.2},
    "gateway": {"num_cpus": 0.2},
}
LONG = "many words " * 200 + "at the end"
TEXTS = ["green tea", "a cup of tea", "Straße 7: 日本語, ελληνικά, 🙂", "line one\nline two", LONG]
LEAST_COSINE = 0.99999
# The tokenizer of which langchain-openai sends ids by default. It would download it; litellm brings a copy.
CL100K = "lib/python*/site-packages/litellm/litellm_core_utils/tokenizers"

FOREIGN_IDS = (
    "must begin with 101 and end with 102, as the ids of this model's tokenizer do: ids of another tokenizer would "
    "give a wrong vector; send the text itself (in langchain-openai: check_embedding_ctx_length=False)"
)
OTHER_MODEL = "model: 'text-embedding-3-small' is not served here; the served model is 'all-MiniLM-L6-v2'"
EMBEDDINGS, ROOT_ROUTE = "POST /v1/embeddings", "POST /"
BASE64, FLOAT = {"encoding_format": "base64"}, {"encoding_format": "float"}

Form = tuple[str, str, str]  # method and path, the kind of the inputs, the other fields as JSON
Drive = Callable[[str, str], tuple[dict[str, Any], list[Form]]]


@pytest.fixture(scope="module")
def installations() -> Iterator[dict[str, Future[None]]]:
    """All clients, being installed, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(environments.install, name) for name in environments.names()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, installations: dict[str, Future[None]]) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("clients"), ARGS)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return SentenceTransformer(resolve(DEFAULT_MODEL), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def expected(reference: SentenceTransformer) -> np.ndarray:
    """(texts, dim) float32."""
    vectors: np.ndarray = reference.encode(TEXTS)
    return vectors


@pytest.fixture
def installed(installations: dict[str, Future[None]]) -> Callable[[str], None]:
    """Waits until a client is installed. Skips the test if its packages cannot be reached."""

    def wait(name: str) -> None:
        try:
            installations[name].result()
        except Unreachable as error:
            pytest.skip(f"{name} cannot be installed: {error}")

    return wait


@pytest.fixture
def drive(server: Server, reference: SentenceTransformer, installed: Callable[[str], None]) -> Drive:
    """Runs a program with the packages of a client. Returns what it printed, and the requests that it sent."""
    ids = [reference.tokenizer(text, truncation=False)["input_ids"] for text in TEXTS]

    def run(name: str, program: str) -> tuple[dict[str, Any], list[Form]]:
        installed(name)
        environment = environments.environment()
        if name == "langchain-openai":
            installed("litellm")
            (cl100k,) = environments.folder_of("litellm").glob(CL100K)
            environment["TIKTOKEN_CACHE_DIR"] = str(cl100k)
        recorder = Recorder(server.url)
        done = subprocess.run(
            [*environments.command_of(name, environments.PROGRAMS / program), recorder.url],
            cwd=environments.folder_of(name),
            env=environment,
            input=json.dumps({"texts": TEXTS, "ids": ids}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        recorder.stop()
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), [form_of(request) for request in recorder.requests]

    return run


def form_of(request: Request) -> Form:
    """A request without its texts."""
    rest = dict(request.body or {})
    rest.pop("model", None)
    given = rest.pop("input", None) or rest.pop("inputs", None)
    kind = type(given).__name__
    if isinstance(given, list):
        kind += f" of {type(given[0]).__name__}"
    return f"{request.method} {request.path}", kind, json.dumps(rest, sort_keys=True)


def form(route: str, kind: str, rest: dict[str, Any] | None = None) -> Form:
    return route, kind, json.dumps(rest or {}, sort_keys=True)


def assert_close(vectors: Any, expected: np.ndarray) -> None:
    """Check that vectors are of length one, and those that are expected."""
    found = np.array(vectors, np.float64)
    assert found.shape == expected.shape
    lengths = np.linalg.norm(found, axis=1)
    assert np.abs(lengths - 1).max() <= 1e-5
    assert ((found * expected).sum(axis=1) / lengths).min() >= LEAST_COSINE


def first_of(vectors: np.ndarray, dimensions: int) -> np.ndarray:
    cut = vectors[:, :dimensions]
    shorter: np.ndarray = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    return shorter


@pytest.mark.parametrize(("name", "program"), [("openai", "with_openai.py"), ("openai-node", "with_openai.mjs")])
def test_openai(drive: Drive, expected: np.ndarray, name: str, program: str) -> None:
    printed, sent = drive(name, program)
    for way in ("default", "float", "parallel", "ids"):
        assert_close(printed[way], expected)
    assert_close(printed["first 64"], first_of(expected, 64))
    assert printed["models"] == ["all-MiniLM-L6-v2"]
    for refused, status, kind, message, code, param in (
        ("other model", 404, "NotFoundError", OTHER_MODEL, "model_not_found", "model"),
        ("other ids", 400, "BadRequestError", f"input.0: {FOREIGN_IDS}", "foreign_token_ids", "input.0"),
    ):
        prefix = f"{status}" if name == "openai-node" else f"Error code: {status} -"
        told = {"class": kind, "code": code, "param": param, "message": f"{prefix} {message}"}
        assert printed[refused] == told
    expected_forms = [
        form(EMBEDDINGS, "list of str", BASE64),
        form(EMBEDDINGS, "list of str", FLOAT),
        form(EMBEDDINGS, "list of list", BASE64),
        form(EMBEDDINGS, "list of str", {**BASE64, "dimensions": 64}),
        form("GET /v1/models", "NoneType"),
        form(EMBEDDINGS, "list of str", BASE64),
        form(EMBEDDINGS, "list of list", BASE64),
        *[form(EMBEDDINGS, "str", BASE64)] * len(TEXTS),
    ]
    if name == "openai":
        expected_forms.append(form(EMBEDDINGS, "list of str", {**FLOAT, "output_dtype": "int8"}))
        assert np.abs(np.array(printed["int8"]) - np.round(expected * 127)).max() <= 1
    assert Counter(sent) == Counter(expected_forms)


def test_langchain_openai(drive: Drive, expected: np.ndarray) -> None:
    printed, sent = drive("langchain-openai", "with_langchain.py")
    assert_close(printed["documents"], expected)
    assert_close(printed["query"], expected[:1])
    assert_close(printed["asyncio"], expected)
    assert printed["by default"] == {
        "code": "foreign_token_ids",
        "message": f"Error code: 400 - input.0: {FOREIGN_IDS}",
    }
    texts = form(EMBEDDINGS, "list of str", BASE64)
    assert sent == [texts, texts, texts, form(EMBEDDINGS, "list of list", BASE64)]


@pytest.mark.parametrize("name", ["huggingface_hub", "huggingface_hub-0.28"])
def test_huggingface_hub(drive: Drive, reference: SentenceTransformer, expected: np.ndarray, name: str) -> None:
    printed, sent = drive(name, "with_huggingface_hub.py")
    assert_close(printed["one"], expected[:1])
    assert_close(printed["list"][:-1], expected[:-1])
    assert_close(printed["parallel"], expected)
    end_of_long = " ".join(LONG.split()[-254:])  # a token each, beside two special tokens
    assert_close(printed["list"][-1:], reference.encode([end_of_long]))
    told = r"inputs: has at least \d+ tokens; the model reads at most 256"
    assert printed["too long"]["class"] == "BadRequestError"
    assert re.fullmatch(told, printed["too long"]["message"])
    old = name.endswith("0.28")

    def options(**given: Any) -> dict[str, Any]:
        return {"parameters": given} if old else given

    prompt = "parameters.prompt_name" if old else "prompt_name"
    told = f"{prompt}: is 'haiku'; the model's prompts are 'document', 'query'"
    assert printed["other prompt"] == {"class": "BadRequestError", "message": told}
    if old:  # it forgets the inputs: `{"inputs": null, "source_sentence": ...}`
        told = "inputs: must be a string, a list of strings, or token ids"
        assert printed["similarity"] == {"class": "BadRequestError", "message": told}
        sentences = form(
            ROOT_ROUTE, "NoneType", {"parameters": {}, "source_sentence": TEXTS[0], "sentences": TEXTS[:2]}
        )
    else:
        assert printed["similarity"] == pytest.approx([1.0, float(expected[0] @ expected[1])], abs=1e-5)
        sentences = form(ROOT_ROUTE, "dict", {"parameters": {}})
    assert sent == [
        form(ROOT_ROUTE, "str", {"parameters": {}} if old else {}),
        form(ROOT_ROUTE, "list of str", options(truncate=True, truncation_direction="Left")),
        sentences,
        form(ROOT_ROUTE, "str", {"parameters": {}} if old else {}),
        form(ROOT_ROUTE, "str", options(prompt_name="haiku")),
        *[form(ROOT_ROUTE, "str", options(truncate=True))] * len(TEXTS),
    ]


@pytest.mark.parametrize("name", ["litellm", "litellm-1.82"])
def test_litellm(drive: Drive, expected: np.ndarray, name: str) -> None:
    printed, sent = drive(name, "with_litellm.py")
    for way in ("default", "float", "ids", "hosted", "parallel"):
        assert_close(printed[way], expected)
    told = f"litellm.NotFoundError: NotFoundError: OpenAIException - Error code: 404 - {OTHER_MODEL}"
    assert printed["other model"] == {"class": "NotFoundError", "message": told}
    unless_told = {"encoding_format": None} if name == "litellm-1.82" else {}
    assert sent == [
        form(EMBEDDINGS, "list of str", unless_told),
        form(EMBEDDINGS, "list of str", FLOAT),
        form(EMBEDDINGS, "list of list", unless_told),
        form(EMBEDDINGS, "list of str"),
        form(EMBEDDINGS, "list of str", unless_told),
        *[form(EMBEDDINGS, "list of str", unless_told)] * len(TEXTS),
    ]


def test_llama_index(drive: Drive, expected: np.ndarray) -> None:
    printed, sent = drive("llama-index", "with_llama_index.py")
    for vectors in printed.values():
        assert_close(vectors["texts"], expected)
        assert_close(vectors["asyncio"], expected)
        assert_close([vectors["query"]], expected[:1])
    assert set(printed) == {"openai", "openai-like", "tei"}
    base64, truncated = form(EMBEDDINGS, "list of str", BASE64), form("POST /embed", "list of str", {"truncate": True})
    assert sent == [base64] * 6 + [truncated] * 3


def test_no_python_client_brings_torch(installations: dict[str, Future[None]]) -> None:
    for installation in installations.values():
        installation.exception()
    assert list(environments.FOLDER.glob("*/lib/python*/site-packages/torch")) == []


SECTIONS = {
    "OpenAI, Python": "openai",
    "OpenAI, Node": "openai-node",
    "LangChain": "langchain-openai",
    "LlamaIndex": "llama-index",
    "LiteLLM": "litellm",
    "Hugging Face": "huggingface_hub",
}


@pytest.mark.parametrize(("section", "name"), SECTIONS.items())
def test_the_page_shows_what_its_examples_print(
    server: Server, installed: Callable[[str], None], section: str, name: str
) -> None:
    installed(name)
    folder = environments.folder_of(name)
    python, environment = str(folder / "bin" / "python"), environments.environment()
    assert differences(CLIENTS_PAGE, folder, server.url, section, python=python, environment=environment) == []


def test_every_section_of_the_page_is_run() -> None:
    assert {example.section for example in examples(CLIENTS_PAGE.read_text())} == set(SECTIONS)
