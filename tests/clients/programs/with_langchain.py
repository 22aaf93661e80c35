"""langchain-openai: texts, and the token ids that it sends by default, which are refused."""

import asyncio
import json
import sys

import openai
from langchain_openai import OpenAIEmbeddings

url, given = sys.argv[1], json.load(sys.stdin)
texts = given["texts"]
options = {"model": "all-MiniLM-L6-v2", "base_url": f"{url}/v1", "api_key": "unused"}
embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)


def refusal():
    try:
        OpenAIEmbeddings(**options).embed_documents(texts)
    except openai.BadRequestError as error:
        return {"code": error.code, "message": str(error)}


print(
    json.dumps(
        {
            "documents": embeddings.embed_documents(texts),
            "query": [embeddings.embed_query(texts[0])],
            "asyncio": asyncio.run(embeddings.aembed_documents(texts)),
            "by default": refusal(),
        }
    )
)
