# Needs Python >= 3.11 and make. Every target sets the project up first when that is missing.
#   PYTHON=python3.12 make setup      another Python
#   make test VENV=/tmp/venv          another virtual environment
#   make test TORCH=2.11              that version of PyTorch, in a virtual environment of its own (.venv-torch-2.11)

PYTHON ?= python3
TORCH ?=
VENV ?= $(if $(TORCH),.venv-torch-$(TORCH),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.sidestream-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1\t/' | expand -t 18

setup: $(STAMP)  ## make the virtual environment and install everything (again when pyproject.toml changed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Sidestream needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]' $(if $(TORCH),'torch==$(TORCH).*')
	@touch $@

demo: $(STAMP)  ## make a clip, run a model depth-parallel on it, write video, chart and table
	$(BIN)/sidestream demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)  ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## measure depth-parallel against its rivals on this CPU
	$(BIN)/python benchmarks/depth_parallel_cpu/run.py
