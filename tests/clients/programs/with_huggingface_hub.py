"""huggingface_hub's InferenceClient, which speaks to text-embeddings-inference at a URL without a path."""

import asyncio
import json
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

url, given = sys.argv[1], json.load(sys.stdin)
texts = given["texts"]
client = InferenceClient(url)


async def embed_in_parallel():
    parallel = AsyncInferenceClient(url)
    calls = [parallel.feature_extraction(text, truncate=True) for text in texts]
    return [found[0].tolist() for found in await asyncio.gather(*calls)]


def unless_refused(call, *args, **options):
    try:
        return call(*args, **options)
    except HfHubHTTPError as error:
        return {"class": type(error).__name__, "message": str(error).rpartition("Bad request:\n")[2]}


print(
    json.dumps(
        {
            "one": client.feature_extraction(texts[0]).tolist(),
            "list": client.feature_extraction(texts, truncate=True, truncation_direction="Left").tolist(),
            "similarity": unless_refused(client.sentence_similarity, texts[0], texts[:2]),
            "too long": unless_refused(client.feature_extraction, texts[-1]),
            "other prompt": unless_refused(client.feature_extraction, texts[0], prompt_name="haiku"),
            "parallel": asyncio.run(embed_in_parallel()),
        }
    )
)
