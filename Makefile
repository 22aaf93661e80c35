# make serve | test | check | bench | bench-peers | clean. Each makes .venv on its first run, and installs again only when
# pyproject.toml or constraints.txt have changed.
SHELL := /bin/bash
# The first interpreter that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
CONFIG ?= serve_config.yaml
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench

.PHONY: serve test check bench bench-peers clean

serve: $(INSTALLED)
	@exec $(BIN)/python -m deployments $(CONFIG)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Throughput and latency here, in about 10 minutes: `make bench BENCH_ARGS=--quick` takes 2. See benchmarks/README.md.
bench: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks.suite $(BENCH_ARGS)

# memserve beside what people use today, in about 25 minutes after the first installs: BENCH_ARGS=--quick takes 8.
bench-peers: $(INSTALLED)
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-peers build .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "memserve needs Python 3.11 or 3.12; set PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "memserve needs a C++ compiler (hnswlib is built from source)" >&2; exit 1; }
	@echo "Installing into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(BENCH_INSTALLED): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@
