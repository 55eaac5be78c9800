# Everything starts here, on a machine with nothing but Python >= 3.11 and make. `make help` lists the commands.
#
# The first command creates $(VENV) with the first of $(VERSIONS) that runs, and installs what it needs; later ones start
# at once, and a changed setup.py installs again.

VENV     ?= .venv
VERSIONS ?= 3.13 3.12 3.11 3.14
WORKERS  ?= 2
WORKDIR  ?= runs/demo
ARGS     ?=

# A shim can exist without a Python behind it, and a Python without venv: each candidate has to run.
PYTHON ?= $(shell for v in $(VERSIONS); do \
	for p in python$$v "$$HOME"/.pyenv/versions/$$v.*/bin/python3 python3; do \
		"$$p" -c "import sys, ensurepip; sys.exit('$$v' != '%d.%d' % sys.version_info[:2])" 2>/dev/null \
			&& { echo "$$p"; exit; }; \
	done; done)

BIN := $(VENV)/bin
SOURCES := $(wildcard kimi_jax configs tests benchmarks examples tools setup.py)

# Tests on eight virtual devices need a process of their own.
define pytest
$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(1)
$(if $(wildcard tests/multidevice),$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(1) tests/multidevice)
endef

.PHONY: help demo test nightly check lint format clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo
	@echo '  ARGS="..."        more arguments for training, such as ARGS="--config.steps=20"'
	@echo '  PYTHON=...        the Python to create $(VENV) with (default: the first of $(VERSIONS) that runs)'

demo: $(VENV)/.core ## train a small Kimi-K2 on real text with MuonClip, here, in minutes
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m kimi_jax.train --config configs/debug.py --workdir $(WORKDIR) $(ARGS)
	@echo "curves: $(WORKDIR)/curves.png   metrics: $(WORKDIR)/metrics.jsonl   sample: above"

test: export XLA_FLAGS += --xla_backend_optimization_level=0 # LLVM's: tests compile more than they compute
test: $(VENV)/.test ## every test but the slow ones, parity with transformers included
	$(call pytest,-m "not slow")

nightly: $(VENV)/.test ## every test
	$(call pytest)

check: lint test ## what a change has to pass: lint, then test

lint: $(VENV)/.test ## formatting, ruff, types, import order
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(VENV)/.test ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove the environment and all caches, but no runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache build *.egg-info

$(VENV)/.python:
	@python="$(PYTHON)"; test -n "$$python" || { \
		echo "no Python $(VERSIONS) with venv found: install one, or say make PYTHON=/path/to/python" >&2; exit 1; }; \
	echo "creating $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV) && touch $@

$(VENV)/.core: setup.py $(VENV)/.python
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test,parity]'
	@touch $@
