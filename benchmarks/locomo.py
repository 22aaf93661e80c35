"""How many of the memories that answer a question are found, on LoCoMo's long conversations.

    python -m benchmarks.locomo DATA.json [--reranker MODEL] [--quick]

Each conversation becomes a user, and each turn a memory with the text `SPEAKER: TEXT`. Each question is asked over HTTP
in every way that the server knows: by vectors, by words, by both, by both with scores that neighbours in the
conversation lend, with recency, and with a reranker if one is given. No language model takes part. The ways take turns,
question by question, and the cache of vectors is off, so that each search embeds its question. Prints tables and writes
benchmarks/results/locomo.json, its report and its plot, which hold figures and nothing of the data.

The data is not a part of this project. It is a list of `{conversation, memories: [{id, session, when, speaker, text}],
questions: [{question, evidence: [ids], category}]}`, made from https://github.com/snap-research/locomo.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import machine, report
from benchmarks.figures import percentiles_ms
from benchmarks.server import memserve, merged, profile

TOP_K = 20
DEPTHS = (1, 3, 5, 10, 20)
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
STAGES: dict[str, dict[str, Any]] = {
    "vector": {"mode": "vector"},
    "words": {"mode": "words"},
    "hybrid": {"mode": "hybrid"},
    "hybrid, context": {"mode": "hybrid", "context": 0},
    "hybrid, recency": {"mode": "hybrid", "recency_half_life_s": 30 * 86_400},
    "hybrid, rerank": {"mode": "hybrid", "rerank": True},
}
_AT_ONCE = 100  # memories in one request

Found = dict[str, Any]


class Server:
    """One client of a running server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120.0, trust_env=False)
        schemas = self._http.get("/openapi.json").raise_for_status().json()["components"]["schemas"]
        self.search_fields = set(schemas["SearchBody"]["properties"])
        self.memory_fields = set(schemas["NewMemoryBody"]["properties"])

    def stages(self, *, reranks: bool) -> list[str]:
        """The ways in which this server can be asked."""
        known = [name for name, options in STAGES.items() if options.keys() <= self.search_fields]
        return [name for name in known if reranks or "rerank" not in STAGES[name]]

    def load(self, conversation: Found) -> None:
        """Add a conversation's memories to its user."""
        memories = [self._memory(one) for one in conversation["memories"]]
        for start in range(0, len(memories), _AT_ONCE):
            body = {"memories": memories[start : start + _AT_ONCE]}
            self._http.post(_path(conversation), json=body).raise_for_status()

    def _memory(self, turn: Found) -> Found:
        given = {
            "id": turn["id"],
            "text": f"{turn['speaker']}: {turn['text']}",
            "happened_at": moment(turn["when"]),
            "thread": f"session {turn['session']}",
        }
        return {name: value for name, value in given.items() if name in self.memory_fields}

    def ask(self, conversation: Found, question: str, stage: str) -> tuple[list[str], float]:
        """The ids that were found, the best first, and the seconds that it took."""
        body = {"query": question, "top_k": TOP_K, **STAGES[stage]}
        began = time.perf_counter()
        answer = self._http.post(f"{_path(conversation)}/search", json=body)
        took_s = time.perf_counter() - began
        results = answer.raise_for_status().json()["results"]
        return [one["id"] for one in results if not one.get("context")], took_s


def _path(conversation: Found) -> str:
    return f"/v1/users/conversation-{conversation['conversation']}/memories"


def moment(when: str) -> str:
    """A time such as `1:56 pm on 8 May, 2023` as RFC 3339. Its zone is unknown, and UTC is assumed."""
    return datetime.strptime(when, "%I:%M %p on %d %B, %Y").replace(tzinfo=UTC).isoformat()


def ranks_of(evidence: Sequence[str], found: Sequence[str]) -> list[int | None]:
    """The rank of each memory that answers a question, from 1 on; None if it was not found."""
    place = {id: rank for rank, id in enumerate(found, 1)}
    return [place.get(id) for id in dict.fromkeys(evidence)]


def figures(asked: Sequence[Sequence[int | None]]) -> Found:
    """Recall and hit rate at each depth, and the mean reciprocal rank, of the ranks that `ranks_of` gives."""

    def within(depth: int) -> list[list[bool]]:
        return [[rank is not None and rank <= depth for rank in ranks] for ranks in asked]

    first = [min((rank for rank in ranks if rank is not None), default=None) for ranks in asked]
    return {
        "questions": len(asked),
        "recall": {depth: round(float(np.mean([np.mean(one) for one in within(depth)])), 4) for depth in DEPTHS},
        "hit": {depth: round(float(np.mean([any(one) for one in within(depth)])), 4) for depth in DEPTHS},
        "mrr": round(float(np.mean([1 / rank if rank else 0.0 for rank in first])), 4),
    }


def questions(data: Sequence[Found], limit: int | None) -> Iterator[tuple[Found, Found]]:
    """Each conversation with each question that has an answer in it."""
    for conversation in data:
        known = {one["id"] for one in conversation["memories"]}
        answerable = [one for one in conversation["questions"] if known.intersection(one["evidence"])]
        yield from ((conversation, one) for one in answerable[:limit])


def measure(server: Server, data: Sequence[Found], stages: Sequence[str], limit: int | None) -> list[Found]:
    """The figures of each stage."""
    for conversation in data:
        server.load(conversation)
        for stage in stages:  # the first search builds the index
            server.ask(conversation, "a question that nobody asks", stage)
    ranks: dict[str, list[list[int | None]]] = {stage: [] for stage in stages}
    took_s: dict[str, list[float]] = {stage: [] for stage in stages}
    categories = []
    for number, (conversation, question) in enumerate(questions(data, limit)):
        categories.append(question["category"])
        for turn in range(len(stages)):
            stage = stages[(number + turn) % len(stages)]
            found, seconds = server.ask(conversation, question["question"], stage)
            ranks[stage].append(ranks_of(question["evidence"], found))
            took_s[stage].append(seconds)
    rows = []
    for stage in stages:
        by_category = {
            category: figures([one for one, of in zip(ranks[stage], categories, strict=True) if of == category])
            for category in sorted(set(categories))
        }
        row = {"stage": stage, **figures(ranks[stage]), **percentiles_ms(took_s[stage])}
        rows.append({**row, "categories": by_category})
    read: list[Found] = json.loads(json.dumps(rows))  # as a report reads them: keys are strings
    return read


def tables(rows: Sequence[Found]) -> list[str]:
    """Quality and latency of each stage, then recall by category."""
    depth = str(TOP_K)
    head = ["search by", f"recall@{TOP_K}", f"hit@{TOP_K}", "MRR", "p50 ms", "p99 ms"]
    whole = []
    for row in rows:
        shares = [f"{row['recall'][depth]:.3f}", f"{row['hit'][depth]:.3f}", f"{row['mrr']:.3f}"]
        whole.append([row["stage"], *shares, report.number(row["p50_ms"]), report.number(row["p99_ms"])])
    kinds = rows[0]["categories"] if rows else {}
    titles = [f"{CATEGORIES.get(int(kind), kind)} ({found['questions']})" for kind, found in kinds.items()]
    parts = [[row["stage"], *(f"{found['recall'][depth]:.3f}" for found in row["categories"].values())] for row in rows]
    return [
        report.table(head, whole) + "\n",
        f"## Recall@{TOP_K} by category of question\n",
        report.table(["search by", *titles], parts),
    ]


def draw(rows: Sequence[Found], path: Path) -> Path:
    """Recall and hit rate by the number of results."""

    def lines(key: str) -> list[report.Line]:
        return [(row["stage"], [float(depth) for depth in row[key]], list(row[key].values())) for row in rows]

    return report.plot(
        path,
        [
            {"title": "Answers that are found", "x": "results", "y": "recall", "log_x": True, "lines": lines("recall")},
            {
                "title": "Questions with an answer",
                "x": "results",
                "y": "hit rate",
                "log_x": True,
                "lines": lines("hit"),
            },
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reranker", help="the model of a stage with a reranker")
    parser.add_argument("--quick", action="store_true", help="two conversations, 30 questions each")
    parser.add_argument("--url", help="a server that runs already, with an empty log; by default one is started")
    options = parser.parse_args()
    data = json.loads(options.data.read_text())
    limit = None
    if options.quick:
        data, limit = data[:2], 30

    def run(url: str, ready: Found) -> None:
        server = Server(url)
        rows = measure(server, data, server.stages(reranks=options.reranker is not None), limit)
        sizes = {"conversations": len(data), "memories": sum(len(one["memories"]) for one in data)}
        found = {"kind": "locomo", **machine.provenance(), **ready, **sizes, "rows": rows}
        found["command"] = "python -m benchmarks.locomo DATA.json"
        print("\n".join(tables(rows)))
        print("\n".join(map(str, report.save(found, machine.RESULTS / "locomo.json"))))

    if options.url:
        run(options.url, httpx.get(f"{options.url}/health/ready", trust_env=False).json())
        return
    reranker = {"reranker": {"model": options.reranker}} if options.reranker else {}
    with memserve(merged(profile(), {"cache": {"max_bytes": 0}}, reranker)) as started:
        run(started.url, started.ready)


if __name__ == "__main__":
    main()
