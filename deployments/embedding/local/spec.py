"""Loads a model with sentence-transformers and reads its requirements.

A model that needs something that is not supported here is refused, with one line for the operator.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from tokenizers import Tokenizer
from transformers.utils.logging import disable_progress_bar

from deployments.embedding.local import unpadded
from deployments.embedding.local.revision import revision_of
from deployments.embedding.model import InputType, ModelInfo
from deployments.errors import ModelUnavailable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Spec:
    """The requirements of a loaded model for the code that tokenizes its inputs and runs it.

    Attributes:
        info: name, dimension, limits and prompts.
        device: where the weights are.
        dtype: of the weights.
        special_ids: the ids of special tokens.
        pad_id: the token id that fills up a padded batch.
        first_position: the position that the model gives to the first token of a text.
        pools_without_prompt: whether the pooling leaves out the tokens of the prompt.
        output: the feature of sentence-transformers that holds the result.
        token_types: whether the model tells the two parts of a pair apart by the type of their tokens.
    """

    info: ModelInfo
    device: torch.device
    dtype: torch.dtype
    special_ids: frozenset[int]
    pad_id: int
    first_position: int
    pools_without_prompt: bool
    output: str = "sentence_embedding"
    token_types: bool = False


def choose_device(device: str) -> str:
    """Resolve `auto` to the first GPU, or to the CPU if there is none."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if device == "cuda" else device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve `auto` to bfloat16 if the device is fast in it, else to float32.

    CUDA devices are from Ampere on; CPUs are with avx512_bf16 or AMX.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_network(
    path: str,
    *,
    name: str,
    device: str,
    dtype: torch.dtype,
    allow_download: bool,
    kind: type[SentenceTransformer] | type[CrossEncoder] = SentenceTransformer,
) -> Any:
    """Load a model of sentence-transformers for inference.

    Args:
        path: a folder, or a hub name.
        name: what errors call the model.
        allow_download: fetch from the hub what is not on disk.
        kind: what the model is loaded as.

    Raises:
        ModelUnavailable: it cannot be loaded, or it is of a kind that is not served.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # it would be lines of a log, or of a program that loads the model in its own process
    try:
        network = kind(path, device=device, local_files_only=not allow_download, model_kwargs={"dtype": dtype})
    except Exception as error:  # a foreign loader may raise anything, and an operator wants one line
        if not allow_download and isinstance(error, OSError) and not Path(path).is_dir():
            message = f"The model {name!r} is neither a folder nor in the hub cache, and allow_download is off."
        else:
            message = f"The model {name!r} cannot be loaded: {first_line(error)}"
        raise ModelUnavailable(message) from error
    if not isinstance(network[0], Transformer) or not hasattr(network.tokenizer, "backend_tokenizer"):
        raise ModelUnavailable(
            f"The model {name!r} is not a transformer with a fast tokenizer; no other kind is served."
        )
    if "message" in network[0].modality_config:
        raise ModelUnavailable(f"The model {name!r} reads chat messages, which are not served.")
    if network[0].query_expansion is not None:
        raise ModelUnavailable(f"The model {name!r} pads queries with mask tokens, which is not supported.")
    return network.eval()  # not .to(dtype): it would round rotary frequencies, which must stay float32


def load_cross_encoder(path: str, *, name: str, device: str, dtype: torch.dtype, allow_download: bool) -> Any:
    """Load a CrossEncoder for inference, by the arguments of `load_network`.

    In half precision, its last layer is computed in float32: a score of eight bits would often equal another's.

    Raises:
        ModelUnavailable: it cannot be loaded, or it does not give each pair one score.
    """
    network = load_network(
        path, name=name, device=device, dtype=dtype, allow_download=allow_download, kind=CrossEncoder
    )
    first = network[0]
    architectures = first.model.config.architectures or []
    if first.transformer_task == "text-generation":
        raise ModelUnavailable(f"The model {name!r} scores a pair by generating text, which is not supported.")
    if len(network) == 1 and not any(one.endswith("ForSequenceClassification") for one in architectures):
        raise ModelUnavailable(f"The model {name!r} is not a cross-encoder: it has no layer that makes a score.")
    if network.num_labels != 1:
        raise ModelUnavailable(f"The model {name!r} gives a pair {network.num_labels} scores; one is supported.")
    if dtype != torch.float32:
        linears = [key for key, module in network.named_modules() if type(module) is torch.nn.Linear]
        network.set_keep_in_fp32_modules([*network.keep_in_fp32_modules, *linears[-1:]])
    return network


def spec_of(network: Any, path: str, *, name: str, device: str, dtype: torch.dtype, max_tokens: int | None) -> Spec:
    """Read the requirements of a loaded model. Changes nothing.

    Args:
        path: the folder or hub name that it was loaded from.
        name: what answers call it.
        max_tokens: an upper limit of all input lengths, in tokens; None for the model's own.

    Raises:
        ModelUnavailable: the model does not specify how long an input may be.
    """
    limits = {kind: min(limit, max_tokens or limit) for kind, limit in longest_inputs(network).items()}
    prompts = {key: prompt or "" for key, prompt in (network.prompts or {}).items()}
    dtype_name = str(dtype).removeprefix("torch.")
    first_ids, last_ids = special_ends(network.tokenizer.backend_tokenizer)
    scores_pairs = isinstance(network, CrossEncoder)
    info = ModelInfo(
        name=name,
        revision=f"{revision_of(path, network)}-{dtype_name}",
        dim=2 if scores_pairs else int(network.get_embedding_dimension()),
        max_tokens=limits[None],
        vocab_size=int(network[0].model.get_input_embeddings().num_embeddings),
        prompts=prompts,
        device=device,
        dtype=dtype_name,
        default_prompt=prompts.get(network.default_prompt_name or "", ""),
        max_tokens_of={kind: limit for kind, limit in limits.items() if kind and limit != limits[None]},
        first_ids=first_ids,
        last_ids=last_ids,
    )
    return Spec(
        info=info,
        device=torch.device(device),
        dtype=dtype,
        special_ids=frozenset(network.tokenizer.all_special_ids),
        pad_id=network.tokenizer.pad_token_id or 0,
        first_position=unpadded.first_position(network[0].model),
        pools_without_prompt=any(getattr(module, "include_prompt", True) is False for module in network),
        output="scores" if scores_pairs else "sentence_embedding",
        token_types=scores_pairs and "token_type_ids" in network.tokenizer.model_input_names,
    )


def longest_inputs(network: Any) -> dict[InputType | None, int]:
    """Tokens of the longest query, the longest document and the longest other input, special tokens included.

    As in sentence-transformers, the limit of a type may be higher than the general one. No limit exceeds the number of
    positions that the model has.

    Raises:
        ModelUnavailable: the model does not say; some tokenizers have no limit of their own.
    """
    first = network[0]
    positions = getattr(first.model.config, "max_position_embeddings", None)
    if positions:
        positions -= unpadded.first_position(first.model)  # the table's entries before it belong to no token
    always = (first.processing_kwargs.get("text") or {}).get("max_length")
    usual = always or network.max_seq_length or positions
    if not usual:
        raise ModelUnavailable(
            "The model does not specify how long an input may be: set max_seq_length in its sentence_bert_config.json."
        )
    asked: dict[InputType | None, int] = {
        None: usual,
        "query": always or first.query_length or usual,
        "document": always or first.document_length or usual,
    }
    return {input_type: int(min(length, positions or length)) for input_type, length in asked.items()}


def special_ends(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts in front of a text, and those that it puts behind it."""
    encoding = tokenizer.encode("a")
    mask = zip(encoding.ids, encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    tokens = [(token, special) for token, special, attended in mask if attended]  # a tokenizer may pad
    first = [token for token, _ in itertools.takewhile(lambda one: one[1], tokens)]
    last = [token for token, _ in itertools.takewhile(lambda one: one[1], reversed(tokens[len(first) :]))]
    return tuple(first), tuple(reversed(last))


def first_line(error: Exception) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
