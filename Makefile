# make demo   install, then train an adapter and show what it learnt
# make test   install, then run the tests
# make help   the rest
#
# TORCH is what pip installs for torch when no interpreter at hand has it. For a CPU-only build:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
SEED ?= 1

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS := $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test quick lint clean results-families results-passages results-ablation results-smoke results benchmarks

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## install            create the environment (.venv) with the package and its test tools
install: $(STAMP)

# An environment that sees an interpreter's own torch saves everybody a second download of it.
$(STAMP): pyproject.toml
	@test -d $(VENV) || { \
	  if $(PYTHON) -c "import torch" 2>/dev/null; then \
	    echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV); fi; }
	$(RUN) -m pip install --quiet --upgrade pip
	@$(RUN) -c "import torch" 2>/dev/null || $(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

## demo               train LoReFT on the embedded model, compare, plot (5 minutes on 2 cores)
demo: install
	$(VENV)/bin/reftune demo

## test               all tests (under 10 minutes on 2 cores)
test: install
	$(RUN) -m pytest

## quick              the daily selection (under 90 seconds)
quick: install
	$(RUN) -m pytest -m quick

## lint               style checks
lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

## results-NAME       grow a table of docs/results.md: families, passages, ablation, smoke
results-%: install
	$(RUN) -m reftune.report.grid recipes/grids/$*.yaml

## clean              remove the environment and all runs
clean:
	rm -rf $(VENV) runs build dist
