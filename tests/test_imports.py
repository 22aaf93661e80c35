"""Imports point one way: each area may import the areas named here, and nothing else of this project or of TRACKED."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = {"deployments", "store", "memserve", "ray", "fastapi", "starlette", "torch"}
LOG = "store.log store.records store.errors"
INDEX = f"store.index {LOG}"
SHELL = "deployments.errors deployments.metrics deployments.serving deployments.settings ray"
MAY_IMPORT = {
    "deployments.__main__": "deployments.serving",
    "deployments.app": "deployments.gateway deployments.embedder deployments.reranker deployments.store "
    "deployments.settings "
    "deployments.serving.sizing deployments.serving.ray_internals ray",
    "deployments.gateway": "deployments.limits deployments.rate_limits deployments.service deployments.api "
    f"deployments.calls {SHELL} fastapi",
    "deployments.embedder": f"deployments.embedding {SHELL}",
    "deployments.reranker": "deployments.embedder deployments.embedding deployments.settings",
    "deployments.store": f"deployments.store_worker deployments.fair_queue deployments.rate_limits store {SHELL}",
    "deployments.store_worker": "deployments.batcher deployments.errors deployments.fair_queue store",
    "deployments.service": "deployments.calls deployments.requests deployments.embedding.model "
    "deployments.embedding.outputs deployments.errors deployments.fair_queue deployments.results deployments.shapes "
    "store",
    "deployments.in_process": "deployments.calls deployments.embedding deployments.limits deployments.requests "
    "deployments.service deployments.settings deployments.shapes deployments.store_worker store",
    "deployments.limits": "deployments.settings",
    "deployments.results": "deployments.shapes store",
    "deployments.shapes": "store",
    "deployments.api": "deployments.service deployments.requests deployments.errors deployments.fair_queue "
    "deployments.rate_limits "
    "deployments.embedding.outputs fastapi starlette",
    "deployments.calls": "deployments.embedding deployments.batcher deployments.errors deployments.fair_queue "
    "deployments.metrics deployments.rate_limits store ray",
    "deployments.requests": "deployments.errors deployments.fair_queue store",
    "deployments.embedding": "deployments.batcher deployments.errors deployments.fair_queue",
    "deployments.embedding.local": "deployments.embedding.model deployments.embedding.token_ids deployments.errors "
    "torch",
    "deployments.serving": "deployments.embedding deployments.errors deployments.requests.origin "
    "deployments.requests.receive deployments.settings store.errors ray starlette",
    "deployments.batcher": "deployments.errors deployments.fair_queue deployments.patience",
    "deployments.fair_queue": "",
    "deployments.patience": "deployments.fair_queue",
    "deployments.rate_limits": "deployments.errors",
    "deployments.metrics": "deployments.embedding ray",
    "deployments.settings": "",
    "deployments.errors": "store.errors",
    "store": "store",
    "store.access": LOG,
    "store.store": f"store.access store.background store.searching {INDEX}",
    "store.background": f"store.searching {INDEX}",
    "store.searching": f"store.adjusting store.ranking {INDEX}",
    "store.adjusting": "store.ranking store.records",
    "store.ranking": "store.records",
    "store.index": LOG,
    "store.log": "store.records store.errors",
    "store.records": "store.errors",
    "store.errors": "",
    "store.__main__": "memserve.command",
    "memserve": "memserve",
    "memserve.command": "memserve deployments.serving store",
    "memserve.cluster": "memserve deployments.serving store",
    "memserve.in_process": "memserve deployments.in_process deployments.settings",
    "memserve.direct": "memserve deployments.errors deployments.requests.origin store",
}


def imports(file: Path) -> Iterator[str]:
    """The dotted names that a module imports, of the packages in TRACKED."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"{node.module}.{name}" for name in names]
        yield from (name for name in names if name.split(".")[0] in TRACKED)


def within(name: str, area: str) -> bool:
    return f"{name}.".startswith(f"{area}.")


MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("deployments", "store", "memserve")
    for file in sorted((ROOT / package).rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    area = max((area for area in MAY_IMPORT if within(module, area)), key=len, default=None)
    allowed = [] if area is None else [area, *MAY_IMPORT[area].split()]
    assert [name for name in imports(MODULES[module]) if not any(within(name, area) for area in allowed)] == []


BENCHMARKS = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "benchmarks").rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES | BENCHMARKS)
def test_only_one_file_uses_private_parts_of_ray(module: str) -> None:
    private = [name for name in imports((MODULES | BENCHMARKS)[module]) if within(name, "ray") and "._" in name]
    assert private == [] or module == "deployments.serving.ray_internals"
