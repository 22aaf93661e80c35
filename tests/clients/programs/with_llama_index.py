"""LlamaIndex's three classes: of OpenAI, of servers like OpenAI's, and of text-embeddings-inference."""

import asyncio
import json
import sys

from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

url, given = sys.argv[1], json.load(sys.stdin)
texts = given["texts"]
options = {"model_name": "all-MiniLM-L6-v2", "api_base": f"{url}/v1", "api_key": "unused"}
classes = {
    "openai": OpenAIEmbedding(**options),
    "openai-like": OpenAILikeEmbedding(**options),
    "tei": TextEmbeddingsInference(base_url=url, model_name="all-MiniLM-L6-v2"),
}
print(
    json.dumps(
        {
            name: {
                "texts": embedding.get_text_embedding_batch(texts),
                "query": embedding.get_query_embedding(texts[0]),
                "asyncio": asyncio.run(embedding.aget_text_embedding_batch(texts)),
            }
            for name, embedding in classes.items()
        }
    )
)
