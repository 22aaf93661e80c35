"""OpenAI's Python client: texts, token ids, both encodings, and errors, with and without asyncio."""

import asyncio
import json
import sys

import openai

url, given = sys.argv[1], json.load(sys.stdin)
texts, ids = given["texts"], given["ids"]
options = {"base_url": f"{url}/v1", "api_key": "unused"}
client = openai.OpenAI(**options)
model = "all-MiniLM-L6-v2"


def vectors(**body):
    return [entry.embedding for entry in client.embeddings.create(**{"model": model, **body}).data]


async def embed_in_parallel():
    async with openai.AsyncOpenAI(**options) as parallel:
        calls = [parallel.embeddings.create(model=model, input=text) for text in texts]
        return [answer.data[0].embedding for answer in await asyncio.gather(*calls)]


def refusal(**body):
    try:
        vectors(**body)
    except openai.APIStatusError as error:
        return {"class": type(error).__name__, "code": error.code, "param": error.param, "message": str(error)}


print(
    json.dumps(
        {
            "default": vectors(input=texts),
            "float": vectors(input=texts, encoding_format="float"),
            "ids": vectors(input=ids),
            "first 64": vectors(input=texts, dimensions=64),
            "models": [entry.id for entry in client.models.list()],
            "other model": refusal(model="text-embedding-3-small", input=texts),
            "other ids": refusal(input=[ids[0][1:-1]]),
            "int8": vectors(input=texts, encoding_format="float", extra_body={"output_dtype": "int8"}),
            "parallel": asyncio.run(embed_in_parallel()),
        }
    )
)
