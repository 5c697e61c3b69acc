# SPDX-License-Identifier: Apache-2.0
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# Extra arguments for installing torch, for example a package index that holds CPU builds.
TORCH_ARGS ?=
# ArviZ 1 needs Python 3.12.
ARVIZ1_PYTHON ?= python3.12
# Test processes, and extra arguments for pytest.
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

ARVIZ1_VENV := .venv-arviz1
ARVIZ1_STAMP := $(ARVIZ1_VENV)/.stamp
ARVIZ1_PIP := $(ARVIZ1_VENV)/bin/python -m pip --disable-pip-version-check
ARVIZ1_TESTS = $(shell grep -rlE 'arviz|plot' tests --include='test_*.py') \
	tests/whole/test_tutorials.py::test_tutorial_runs[posterior_analysis]

.PHONY: help setup setup-arviz1 test test-all test-faults test-arviz1 coverage mutants demo lint docs clean
.PHONY: bench bench-training bench-calibration bench-latents bench-tightness bench-modes bench-prior

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Create .venv and install the package with pinned dependencies.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make setup PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -c constraints.txt -e '.[test,lint,docs]'
	touch $@

# ArviZ writes a file on the first import of a day, which two test processes must not do at once.
# TIMEFORMAT adds the processor time of all test processes, which does not depend on WORKERS.
test coverage: PYTEST_SELECT := -m "not slow"
test: ## Run the quick tests and the doctests of the package: all but those marked slow.
test-all: ## Run all tests and doctests, the slow ones too.
test test-all: setup
	@$(BIN)/python -W ignore -c 'import arviz'
	TIMEFORMAT='CPU seconds: %U user + %S system'; export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE; \
	time $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --doctest-modules $(PYTEST_SELECT) \
		$(PYTEST_ARGS) pyro_lvebm tests

setup-arviz1: $(ARVIZ1_STAMP) ## Create .venv-arviz1 with ArviZ 1 on ARVIZ1_PYTHON, 3.12 or newer.

$(ARVIZ1_STAMP): pyproject.toml constraints-arviz1.txt
	@$(ARVIZ1_PYTHON) -c 'import sys; sys.exit("Python 3.12 or newer is needed: make setup-arviz1 ARVIZ1_PYTHON=..." if sys.version_info < (3, 12) else 0)'
	$(ARVIZ1_PYTHON) -m venv $(ARVIZ1_VENV)
	$(ARVIZ1_PIP) install -c constraints-arviz1.txt $(TORCH_ARGS) torch
	$(ARVIZ1_PIP) install -c constraints-arviz1.txt -e '.[test]' 'arviz>=1'
	touch $@

test-arviz1: setup-arviz1 ## Run the tests that touch ArviZ or plots, and the tutorial, on ArviZ 1.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(ARVIZ1_VENV)/bin/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) $(ARVIZ1_TESTS)

coverage: setup ## Run the tests with line and branch coverage.
	@$(BIN)/python -W ignore -c 'import arviz'
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(BIN)/python -m pytest -n $(WORKERS) --doctest-modules $(PYTEST_SELECT) \
		--cov=pyro_lvebm --cov-branch --cov-report=term $(PYTEST_ARGS) pyro_lvebm tests

test-faults: setup ## Load 5,000 damaged checkpoints, and kill 20 fits.
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST_ARGS) \
		tests/training/test_checkpoint_faults.py tests/training/test_resume.py

mutants: setup ## Check that the tests notice deliberate faults; ONLY=pattern for some.
	@$(BIN)/python -W ignore -c 'import arviz'
	$(BIN)/python tests/faults/run.py --jobs $(WORKERS) $(if $(ONLY),--only '$(ONLY)')

# One thread: two spend more time waiting for each other on matrices of this size than they save.
demo: setup ## Fit the digits; write figure, table, ArviZ file and model to demo/.
	OMP_NUM_THREADS=1 $(BIN)/python -m pyro_lvebm demo --out demo

lint: setup ## Check style, types and layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyro_lvebm
	$(BIN)/lint-imports

docs: setup ## Build the documentation into docs/_build/html; warnings are errors.
	$(BIN)/python -m sphinx -W -b html docs docs/_build/html

bench: setup ## Print speed ratios; QUICK=1 for a short run.
	$(BIN)/python -m benchmarks.speed $(if $(filter-out 0,$(QUICK)),--quick)

# One process for each core, with one thread each.
bench-training: setup ## Train on every data set of the suite, beside peers; QUICK=1 for a minute or two.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training $(if $(filter-out 0,$(QUICK)),--quick)

bench-calibration: setup ## Check the stated errors of log Z and log C(x); QUICK=1 for a minute.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.calibration $(if $(filter-out 0,$(QUICK)),--quick)

bench-latents: setup ## What latents of generators carry, and R² of factors; QUICK=1 for half a minute.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.latents $(if $(filter-out 0,$(QUICK)),--quick)

bench-tightness: setup ## Compare particles with restricted guides at one θ; QUICK=1 for a minute.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.tightness $(if $(filter-out 0,$(QUICK)),--quick)

bench-modes: setup ## Fit rare modes of all shares and distances; QUICK=1 for one fit.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.modes $(if $(filter-out 0,$(QUICK)),--quick,--results bench-modes.jsonl)

bench-prior: setup ## Compare an energy prior with a normal one on one decoder; QUICK=1 for half a minute.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.priors $(if $(filter-out 0,$(QUICK)),--quick,--results bench-prior.jsonl)

clean: ## Remove outputs and caches; keep .venv and .venv-arviz1.
	rm -rf demo docs/_build build dist *.egg-info
	rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
