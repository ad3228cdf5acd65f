# Every target makes .venv and installs what it needs; nothing has to be set up by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The torch that CI runs. `make TORCH=torch demo` takes any torch the package index offers, such as a CUDA build.
TORCH ?= torch==2.13.0
# A CUDA build of torch brings its own triton; a CPU build brings none.
TRITON ?= triton>=3.6,<3.8
STAMPS := $(VENV)/.stamps
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint types bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMPS)/base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q "$(TRITON)"
	$(BIN)/python -m pip install -q -e ".[transformers,bench]"
	touch $@

$(STAMPS)/dev: $(STAMPS)/base
	$(BIN)/python -m pip install -q -e ".[transformers,bench,dev]"
	touch $@

demo: $(STAMPS)/base ## stock against batchproof on the built-in model, with receipts and a plot (ARGS="--model DIR")
	$(BIN)/batchproof demo --out demo_out $(ARGS)

test: $(STAMPS)/dev ## the test suite (GPU tests are skipped where there is no GPU)
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(STAMPS)/dev ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(STAMPS)/dev ## ruff, then the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: $(STAMPS)/dev ## mypy --strict
	$(BIN)/mypy

bench: $(STAMPS)/dev ## a benchmark, and its result file (ARGS="generate --tokens 64"; ARGS=--help lists them)
	$(BIN)/python benchmarks/run.py $(or $(ARGS),generate)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo_out
