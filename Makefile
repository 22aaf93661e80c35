# Each target installs .venv on its first run, and again only if pyproject.toml or constraints.txt have changed.
SHELL := /bin/bash
# The first interpreter that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
CONFIG ?= serve_config.yaml
VENV := .venv
BIN := $(VENV)/bin
# Python may keep the bytecode of the tests and their assertions: without it a third of `make unit` is compiling.
export PYTHONDONTWRITEBYTECODE :=
INSTALLED := $(VENV)/.installed
WITHOUT_SERVER := --ignore=tests/cluster --ignore=tests/clients

.PHONY: serve unit test clients fuzz audit wheel check docs bench bench-peers clean

# Serve until Ctrl-C: `make serve CONFIG=my.yaml` takes another configuration.
serve: $(INSTALLED)
	@exec $(BIN)/memserve serve $(CONFIG)

# The tests that start no Ray Serve, load no PyTorch model and are not marked slow, in two processes. Of those for both
# databases, the ones with SQLite.
unit: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(WITHOUT_SERVER) --ignore=tests/embedding/local -m "not slow" $(PYTEST_ARGS)

# All tests: first those without Ray Serve, then those against a live server, which need both cores.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(WITHOUT_SERVER) $(PYTEST_ARGS)
	$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

# Other projects' clients against a live server. Installs each into build/clients/ on the first run, with pip and npm.
clients: $(INSTALLED)
	$(BIN)/python -m pytest tests/clients -rs $(PYTEST_ARGS)

# Requests that schemathesis makes from the OpenAPI document, in about two minutes; FUZZ_ARGS=--seed=2 makes others.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# Known vulnerabilities of the pinned versions, if the advisories of PyPI can be reached.
audit: $(INSTALLED)
	$(BIN)/python .ci/audit

# Builds a wheel and tries it as a new user would: in new environments and empty folders. Takes a few minutes.
wheel: $(INSTALLED)
	.ci/wheel $(BIN)/python

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

# The documentation as a site, in site/.
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Throughput and latency on this machine, in about 10 minutes; `BENCH_ARGS=--quick` takes 2. See benchmarks/README.md.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.suite $(BENCH_ARGS)

# Compares memserve with other servers, in about 25 minutes after the first installs; `BENCH_ARGS=--quick` takes 8.
bench-peers: $(INSTALLED)
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .venv-peers build site .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "memserve needs Python 3.11 or 3.12; set PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "memserve needs a C++ compiler (hnswlib is built from source)" >&2; exit 1; }
	@echo "Installing into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,parquet,bench,dev]'
	@touch $@
