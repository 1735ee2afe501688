# Everything a developer runs. Each target makes its own .venv first: there is nothing to do by hand.

PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2
FULL   ?= benchmarks/results/bench-full

VENV := .venv
BIN  := $(VENV)/bin
# `python -m` and not the scripts beside it: their first line breaks when the checkout is moved.
PY   := $(BIN)/python
PIP  := $(PY) -m pip --disable-pip-version-check
# Each process begins with a run of neighbouring tests, which share what they have made, and takes from others when done.
PARALLEL := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL: # lint before tests, so that pytest's summary is the last output
.DELETE_ON_ERROR:
.PHONY: help install lint format test test-all bench bench-full clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  ARGS="-k name" is handed on to pytest or lowbit, JOBS=8 runs as many tests at once (0: in one process),'
	@echo '  PYTHON=python3.12 picks the interpreter'

install: $(VENV)/.dev ## make .venv with everything for development

lint: $(VENV)/.dev ## style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.dev ## format the code, mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: lint ## what CI runs: lint, then all tests but the slow ones
	$(PY) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev ## all tests, the slow ones too
	$(PY) -m pytest $(PARALLEL) $(ARGS)

bench: $(VENV)/.bench ## a few minutes' demonstration of 4-bit training against BF16 Adam
	$(BIN)/lowbit bench --demo $(ARGS)

bench-full: $(VENV)/.bench ## the full comparison, a quarter of an hour on two quiet cores; goes on where it was stopped
	$(BIN)/lowbit bench --full --resume --out $(FULL) $(ARGS)
	$(PY) benchmarks/readme.py

clean: ## remove .venv, caches and build outputs; results in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache lowbit/native/_lowbit.*
	find lowbit tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say which extra is installed and are older than their sources when that must be done again.
$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'Installing into $(VENV) (minutes the first time: torch is large)'
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.bench $@ # dev contains bench

$(VENV)/.bench: $(VENV)/.made pyproject.toml constraints.txt
	@echo 'Installing into $(VENV) (minutes the first time: torch is large)'
	$(PIP) install --quiet -c constraints.txt -e '.[bench]'
	@touch $@

# Editable installs without a setup.py came with pip 21.3, and Python 3.10 may bring an older one.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'lowbit needs Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo 'Could not make $(VENV). On Debian and Ubuntu, install the package python3-venv.'; exit 1; }
	$(PIP) install --quiet -c constraints.txt 'pip>=21.3'
	@touch $@
