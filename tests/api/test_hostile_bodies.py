"""Bodies that no client should send to the routes of the model: each is answered at once, and never with a 5xx.

The client of `app` also checks that every answer is as documented, and every body that was accepted.
"""

from __future__ import annotations

import gzip
import json

import pytest

from deployments.errors import MAX_CHARACTERS
from tests.local_app import LocalApp

FIELDS = {
    "/v1/embeddings": "input",
    "/embed": "inputs",
    "/": "inputs",
    "/tokenize": "inputs",
    "/similarity": "inputs",
    "/decode": "ids",
}
VALUES = [
    *("null", "true", "0", "-1", "1.5", "1e999", "-1e999", "NaN", "Infinity", "[]", "{}", "[[]]", "[[[]]]", "[null]"),
    *("[true]", "[1.0]", "[1e3]", "[-1]", "[0]", "[false]"),
    *('""', '" "', '{"a": 1}', '["a", 1]', '["a", ["b"]]', '[1, "a"]', "[[1], 2]", '[[1], ["a"]]', "[true, 1]"),
    *("[1, true]", "[1, 1.0]", '["\\ud83d"]', '"\\ud800"', '"\\udc00x"'),
    *("[2147483647]", "[9223372036854775807]", "[9223372036854775808]", "[18446744073709551616]"),
    *('"\\uffff"', '"a\\u0000b"', '"\\u202e' + "\u0301" * 3_000 + '"', f'"{"x" * 100_000}"'),
    *("9" * 5_000, f"[{'9' * 5_000}]", "1" + "0" * 400, "[" * 50_000, '{"a":' * 50_000, "[" * 5_000 + "]" * 5_000),
    *(json.dumps(["a"] * 3_000), json.dumps([[1]] * 3_000), json.dumps([1] * 5_000), json.dumps([[1] * 5_000])),
    '{"source_sentence": 1, "sentences": "b"}',
    '{"source_sentence": null, "sentences": null}',
    '{"source_sentence": "a", "sentences": {"b": 1}}',
    '{"source_sentence": "\\ud800", "sentences": ["b"]}',
]
OPTIONS = {
    "model": ['""', '"\\u0000"', '"\\ud800"', "1", "[]", f'"{"m" * 100_000}"'],
    "dimensions": ["0", "-1", "1e9", "1.0", '"3"', "true", "[]", "33", "9223372036854775808", "1" + "0" * 4_400],
    "encoding_format": ['"hex"', "1", "[]", '"\\ud800"', f'"{"b" * 100_000}"'],
    "truncate": ['"END"', "1", "{}"],
    "input_type": ['"search_query"', "1", "{}"],
    "output_dtype": ['"int4"', "1"],
    "user": ["1", '"\\ud800"', "{}", f'"{"u" * 100_000}"'],
    "truncation_direction": ['"up"', "1", '"\\ud800"'],
    "prompt_name": ["1", '""', '"\\ud800"', f'"{"p" * 100_000}"'],
    "normalize": ["2", '"x"'],
    "parameters": ["1", "[]", '{"truncate": "x"}', '{"prompt_name": "\\ud800"}', '{"parameters": {"parameters": {}}}'],
    "add_special_tokens": ["1", '"x"'],
    "skip_special_tokens": ["1", "{}"],
    "unknown": ["1", "[" * 5_000 + "]" * 5_000, "9" * 5_000, '"\\ud800"'],
    "\\ud800": ["1"],
    "": ["1"],
}
BODIES = [
    *(b"", b" ", b"null", b"[]", b"1", b'"a"', b"{", b"}", b'{"input"', b'{"input": "a"', b'{"input": "a"}x'),
    *(b'{"input": "a"}{"input": "b"}', b'\xef\xbb\xbf{"input": "a"}', b"\xff\xfe{\0", b'{"input": "\xff"}'),
    *(b'{"input": "\xed\xa0\x80"}', b"{'input': 'a'}", b'{"input": "a",}', b'// x\n{"input": "a"}', b"\0" * 1_000),
    *(b"[" * 100_000, b'{"a":' * 100_000, b'{"input": "a\nb"}', b'{"input": "' + b"\\u0000" * 20_000 + b'"}'),
    b'{"input": "a", ' + b", ".join(b'"k%d": 1' % n for n in range(20_000)) + b"}",
]
GOOD = dict.fromkeys(FIELDS, '"a"') | {
    "/decode": "[1]",
    "/similarity": '{"source_sentence": "a", "sentences": ["b"]}',
}


def hostile_bodies(path: str) -> list[bytes]:
    field, good = FIELDS[path], GOOD[path]
    values = [f'{{"{field}": {value}}}'.encode() for value in VALUES]
    options = [
        f'{{"{field}": {good}, "{name}": {value}}}'.encode() for name, given in OPTIONS.items() for value in given
    ]
    return values + options + BODIES


@pytest.mark.parametrize("path", FIELDS)
async def test_a_hostile_body_is_answered_with_a_status_below_500(app: LocalApp, path: str) -> None:
    for body in hostile_bodies(path):
        answer = await app.http.post(path, content=body)
        assert answer.status_code in (200, 400, 404, 413), body[:100]
        if answer.status_code != 200:
            assert len(answer.content) < 10 * MAX_CHARACTERS, body[:100]


@pytest.mark.parametrize("path", FIELDS)
async def test_a_hostile_gzip_body_is_answered_with_a_status_below_500(app: LocalApp, path: str) -> None:
    good = f'{{"{FIELDS[path]}": {GOOD[path]}}}'.encode()
    zipped = gzip.compress(good)
    for body, status in (
        (zipped, 200),
        (good, 400),
        (gzip.compress(b""), 400),
        (zipped[:-5], 400),
        (zipped[:-8] + bytes(8), 400),
        (gzip.compress(zipped), 400),
        (zipped + b"xx", 400),
        (gzip.compress(b"") * 20_000, 400),
        (gzip.compress(b"0" * 50_000_000), 413),
    ):
        answer = await app.http.post(path, content=body, headers={"content-encoding": "gzip"})
        assert answer.status_code == status, body[:100]
