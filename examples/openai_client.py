"""Embed texts with OpenAI's own Python client: only `base_url` changes.

Start memserve with `make serve`, then run this in another terminal:

    .venv/bin/python examples/openai_client.py

It prints:

    3 vectors of 384 dimensions, 25 tokens
    0.64  How do I reset my password?
    0.23  Where is my parcel?
    cut to 64 dimensions, length 1.00
"""

import sys

import numpy as np
from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
MODEL = "all-MiniLM-L6-v2"

# memserve has no keys yet, but the client insists on one: any text will do.
client = OpenAI(base_url=f"{URL}/v1", api_key="unused")

question = "I forgot my login credentials."
articles = ["How do I reset my password?", "Where is my parcel?"]

# One request carries many texts. The answer keeps their order.
answer = client.embeddings.create(model=MODEL, input=[question, *articles])
vectors = np.array([item.embedding for item in answer.data])  # (3, 384), each of length one
print(f"{len(vectors)} vectors of {vectors.shape[1]} dimensions, {answer.usage.total_tokens} tokens")

# Vectors have length one, so the dot product is the cosine similarity.
for article, similarity in zip(articles, vectors[1:] @ vectors[0], strict=True):
    print(f"{similarity:.2f}  {article}")

# `dimensions` keeps the first values and scales the vector to length one again.
short = client.embeddings.create(model=MODEL, input=question, dimensions=64).data[0].embedding
print(f"cut to {len(short)} dimensions, length {np.linalg.norm(short):.2f}")
