"""Loaded by schemathesis: how it writes a body that is not JSON, and which requests it leaves out."""

from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def ndjson(_: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


# The last parts of these paths are possible ids, so the paths have the methods of a memory or a key as well.
_ALSO_IDS = ("/memories/duplicates", "/memories/get", "/memories/search", "/keys/self")


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave out two kinds of requests, of which schemathesis expects the wrong answer.

    Those whose only fault is an unknown header: HTTP asks servers to ignore it. And those by a method that the document
    does not name for a path, if the path is also that of an id.
    """
    other_method = case.method.upper() != case.operation.method.upper()
    return "x-schemathesis-unknown-property" not in (case.headers or {}) and not (
        other_method and case.operation.path.endswith(_ALSO_IDS)
    )
