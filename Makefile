# Works on a machine with only python >= 3.11 and make; everything lands in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help venv demo test test-aot lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed  ## create .venv and install the package with its test extra

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llada_jax needs python >= 3.11; this is %s. Try: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[lint]"
	@touch $@

$(VENV)/.aot: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[aot]"
	@touch $@

demo: venv  ## sample the built-in model in three modes and watch it edit its draft
	$(BIN)/llada-jax demo

test: venv  ## the tests that need no accelerator
	$(BIN)/python -m pytest -n $(WORKERS) -m "not aot and not gpu and not tpu"

test-aot: venv $(VENV)/.aot  ## compile for four TPU generations with the real TPU compiler
	$(BIN)/python -m pytest -n $(WORKERS) -m aot

lint: venv $(VENV)/.lint  ## ruff, pyright, and the floors of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: venv $(VENV)/.lint  ## rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .import_linter_cache
