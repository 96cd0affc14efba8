# GNU make 3.81 or newer. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := $(wildcard modelserve tests examples benchmarks)

# Test processes. Each imports PyTorch and TensorFlow and has servers of its own: about 3 GB of memory.
JOBS ?= 2

# A stamp is renewed when the list it was installed from changes.
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev
PGBOUNCER := .cache/pgbouncer/usr/sbin/pgbouncer

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check format bench docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO) ## Train, register, serve and hot-reload a real model (KEEP=1 leaves it running)
	@KEEP="$(KEEP)" exec $(BIN)/python -m examples.demo

test: $(DEV) $(PGBOUNCER) ## Run every test against real servers (ARGS="-k name", ARGS=--cov, JOBS=0 for one process)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

check: $(DEV) ## Check format, lint, types, imports and documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	$(MAKE) docs

format: $(DEV) ## Format the code and apply the safe lint fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(DEV) ## Measure every budget; results land in benchmarks/results
	@set -e; for file in benchmarks/[a-z]*.py; do \
		echo "== $$file"; $(BIN)/python -m benchmarks.$$(basename $$file .py); \
	done

docs: $(DEV) ## Build the documentation into docs/_build/html
	$(BIN)/sphinx-build -n -W --keep-going -q docs docs/_build/html

$(PGBOUNCER):
	@command -v pgbouncer > /dev/null || sh tests/get_pgbouncer.sh .cache/pgbouncer

clean: ## Remove the environment and everything built
	rm -rf $(VENV) .demo .hypothesis .coverage* benchmarks/results docs/_build build dist .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "modelserve needs Python 3.11 or newer, but $(PYTHON) is older or missing." >&2; \
		echo "Name one that is not: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(DEMO): requirements/demo.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(DEV): requirements/dev.txt $(DEMO)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	@touch $@
