# make demo   install, then train an adapter and show what it learned
# make test   install, then run the tests
# make help   the rest
#
# Needs Python 3.11 or newer with its venv module. TORCH is what pip installs for torch, unless the
# interpreter has one that satisfies it. For a build for the CPU alone:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch
PYTHON ?= python3
VENV ?= .venv
THREADS ?= 1
JOBS ?= 2
# Where figures come from: arguments of the speed benchmark, and an interpreter that has pyreft.
SPEED ?= --d 512 1024
PYREFT ?= pyreft-env/bin/python

RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
OLDEST_TORCH := 2.6
PUBLISH := $(RUN) -m reftune.report.results add

export OMP_NUM_THREADS := $(THREADS)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test quick lint clean benchmarks FORCE

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## install            create the environment (.venv) with the package and its test tools
install: $(STAMP)

# An environment that sees an interpreter's own torch saves everybody a second download of it. pip
# then finds $(TORCH) satisfied, or installs it; the constraint keeps the next step from replacing it
# by another build. It is the version pip knows: torch.__version__ may carry a build tag (+cu132) that
# the installed package does not.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'reftune needs Python 3.11 or newer. Name one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12' >&2; \
	  exit 1; }
	@test -x $(RUN) || { \
	  sees=; $(PYTHON) -c 'import sys, torch; v = torch.__version__.split("."); \
	    sys.exit((int(v[0]), int(v[1])) < tuple(map(int, "$(OLDEST_TORCH)".split("."))))' \
	    2>/dev/null && sees=--system-site-packages; \
	  $(PYTHON) -m venv $$sees $(VENV) || { \
	    rm -rf $(VENV); \
	    echo 'No environment could be made. Install the venv module (Debian, Ubuntu: apt install' >&2; \
	    echo 'python3-venv), or name another interpreter with PYTHON=.' >&2; \
	    exit 1; }; }
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH) "torch>=$(OLDEST_TORCH)"
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(RUN) -m pip install --quiet -e ".[dev]" -c $(VENV)/constraints.txt
	@touch $(STAMP)

## demo               train LoReFT on the embedded model, compare, plot
demo: install
	$(VENV)/bin/reftune demo

## test               all tests
test: install
	$(RUN) -m pytest -n $(JOBS) --dist loadfile

## quick              the daily selection of tests (under 90 seconds)
quick: install
	$(RUN) -m pytest -m quick -n $(JOBS) --dist loadfile

## lint               style checks
lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

## benchmarks         speed and memory of a training step, small, on this machine
benchmarks: install
	$(RUN) benchmarks/step.py --quick

## results-NAME       grow a table of docs/results.md: families, passages, heft, ablation, smoke
results-%: install FORCE
	$(RUN) -m reftune.report.grid recipes/grids/$*.yaml

## results-demo       the demo's figures, into docs/results.md
results-demo: demo
	$(PUBLISH) runs/demo/report.json --section demo --command 'make results-demo'

## results-gates      what the embedded model can do
results-gates: install FORCE
	@mkdir -p runs
	$(RUN) -m reftune.nano gates --json > runs/gates.json
	$(PUBLISH) runs/gates.json --section gates --command 'make results-gates'

## results-speed      speed and memory; with PYREFT=interpreter beside pyreft
results-speed: install FORCE
	$(RUN) benchmarks/step.py $(SPEED) --publish $(if $(wildcard $(PYREFT)),--pyreft-python $(PYREFT))

## results-causal     what causal caching saves, in time and memory
results-causal: install FORCE
	$(RUN) benchmarks/causal.py --resume runs/causal.jsonl --publish

## results-parity     the same numbers as pyreft; needs PYREFT=interpreter
results-parity: install FORCE
	$(RUN) benchmarks/parity_pyreft.py --pyreft-python $(PYREFT) --publish

## clean              remove the environment and build files; runs/ stays
clean:
	rm -rf $(VENV) build dist

FORCE:
