# Everything runs in .venv, which is built on first use:  make demo | test | lint | bench | docs
# Measured again, in minutes to hours:  make theory | results
# Another interpreter:  make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test lint ruff format-check imports types bench theory results examples docs \
        clean

demo: install
	$(BIN)/python -m convexrobust demo

test: install
	$(BIN)/python -m pytest

lint: ruff format-check imports types

ruff: install
	$(BIN)/ruff check .

format-check: install
	$(BIN)/ruff format --check .

imports: install
	$(BIN)/lint-imports

types: install
	$(BIN)/mypy convexrobust

# Each benchmark once, in the size that only shows that it runs. _*.py are their helpers, and the
# theory scripts run among the tests.
BENCHMARKS := $(filter-out benchmarks/theory/%,$(wildcard benchmarks/*/[!_]*.py))
bench: install
	@set -e; for script in $(BENCHMARKS) benchmarks/theory/report.py; do \
	  echo "$$script --smoke"; $(BIN)/python "$$script" --smoke; \
	done

# Every theory script: each claim with its number, verdict and picture, in one report.
theory: install
	$(BIN)/python benchmarks/theory/report.py

# The page of results in the docs, from the records in benchmarks/results.
results: install
	$(BIN)/python benchmarks/results_page.py

# The docs build runs the examples too and shows their figures.
examples: install
	@set -e; for script in $(wildcard examples/plot_*.py); do \
	  echo "$$script"; MPLBACKEND=Agg $(BIN)/python "$$script"; \
	done

docs: install
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs docs/_build/html

clean:
	rm -rf build dist docs/_build docs/auto_examples docs/generated docs/sg_execution_times.rst
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

install: .venv/installed

# torch comes first: with it in place, nothing that is installed after it can pick another build.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "convexrobust needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@
