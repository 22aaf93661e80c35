"""Token ids that callers send in place of texts: which are accepted, and what is read of those that are too long.

Ids are used verbatim, so ids of another tokenizer would silently give a vector that has nothing to do with the text.
The special tokens that a model's own tokenizer puts around a text tell its ids from others'.
"""

from collections.abc import Sequence
from typing import Literal, cast

from deployments.embedding.model import ModelInfo, Truncate
from deployments.errors import InvalidRequest

Accepted = Literal["checked", "any", "refuse"]

_SEND_TEXTS = "send the text itself (in langchain-openai: check_embedding_ctx_length=False)"


def check(inputs: Sequence[str] | Sequence[Sequence[int]], info: ModelInfo, accepted: Accepted) -> None:
    """Refuse token ids that are not accepted. Texts are not looked at.

    Args:
        inputs: texts, or lists of token ids as the caller sent them.
        info: of the model that is to read them.
        accepted: `checked` accepts the ids that begin and end with the model's special tokens, and all ids if the model
            has none; `any` accepts all ids, and `refuse` none.

    Raises:
        InvalidRequest: the ids at `position` are not accepted.
    """
    if accepted == "any":
        return
    for position, given in enumerate(inputs):
        if isinstance(given, str):
            continue
        if accepted == "refuse":
            message = f"must be a text, since this server accepts no token ids: {_SEND_TEXTS}"
            raise InvalidRequest(message, None, "token_ids_refused", position)
        if not _is_framed(cast(Sequence[int], given), info):
            message = (
                f"must {_ends(info)}, as the ids of this model's tokenizer do: ids of another tokenizer would give a "
                f"wrong vector; {_SEND_TEXTS}"
            )
            raise InvalidRequest(message, None, "foreign_token_ids", position)


def cut(ids: Sequence[int], limit: int, truncate: Truncate, info: ModelInfo) -> list[int]:
    """At most `limit` of the ids. `truncate` is the end that is cut off; `none` cuts as `end` does.

    The special tokens at both ends are kept, as they are if a text is cut.
    """
    if len(ids) <= limit:
        return list(ids)
    first, last = (list(info.first_ids), list(info.last_ids)) if _is_framed(ids, info) else ([], [])
    if len(first) + len(last) > limit:
        first, last = [], []
    if truncate == "start":
        return first + list(ids[len(ids) - limit + len(first) :])
    return list(ids[: limit - len(last)]) + last


def _is_framed(ids: Sequence[int], info: ModelInfo) -> bool:
    first, last = len(info.first_ids), len(info.last_ids)
    if len(ids) < first + last:
        return False
    return tuple(ids[:first]) == info.first_ids and tuple(ids[len(ids) - last :]) == info.last_ids


def _ends(info: ModelInfo) -> str:
    ends = (("begin", info.first_ids), ("end", info.last_ids))
    return " and ".join(f"{verb} with {', '.join(map(str, ids))}" for verb, ids in ends if ids)
