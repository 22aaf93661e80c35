"""LiteLLM, of which some versions send `encoding_format: null` unless they are told otherwise."""

import asyncio
import json
import sys

import litellm

url, given = sys.argv[1], json.load(sys.stdin)
texts, ids = given["texts"], given["ids"]
options = {"model": "openai/all-MiniLM-L6-v2", "api_base": f"{url}/v1", "api_key": "unused"}
litellm.suppress_debug_info = True


def vectors(**body):
    return [entry["embedding"] for entry in litellm.embedding(**{**options, **body}).data]


async def embed_in_parallel():
    answers = await asyncio.gather(*(litellm.aembedding(input=[text], **options) for text in texts))
    return [answer.data[0]["embedding"] for answer in answers]


def refusal(**body):
    try:
        vectors(**body)
    except litellm.NotFoundError as error:
        return {"class": type(error).__name__, "message": str(error)}


print(
    json.dumps(
        {
            "default": vectors(input=texts),
            "float": vectors(input=texts, encoding_format="float"),
            "ids": vectors(input=ids),
            "hosted": vectors(input=texts, model="hosted_vllm/all-MiniLM-L6-v2"),
            "other model": refusal(input=texts, model="openai/text-embedding-3-small"),
            "parallel": asyncio.run(embed_in_parallel()),
        }
    )
)
