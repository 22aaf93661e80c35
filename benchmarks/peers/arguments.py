"""The options that every peer's program has."""

import argparse
from pathlib import Path


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    made.add_argument("--port", type=int, required=True)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--corpus", type=Path, help="folder of a corpus, whose memories are there at the start")
    return made
