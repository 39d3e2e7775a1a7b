# Needs Python 3.10 or newer and make; everything else goes into .venv, with the versions of constraints.txt.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := test lint docs vision

# Modules of the user's own environment would shadow the pinned ones.
unexport PYTHONPATH

.PHONY: help quickstart test lint bench docs clean
# Two installs at once would write to the same environment.
.NOTPARALLEL:

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

quickstart: $(VENV)/.base  ## train, grow and compare small models on an embedded corpus
	$(BIN)/tokenformer quickstart --out runs/quickstart

# Two workers of one thread each: faster than one worker of two on many small tests, and no thread waits for another's core.
test: $(VENV)/.test  ## run all tests; needs no network
	TOKENFORMER_TEST_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.lint  ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.vision  ## run every benchmark in its short form
	$(BIN)/tokenformer bench all --quick

docs: $(VENV)/.docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what the other targets made, except runs/
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# Stamps in .venv: made, then the package alone (base) or with one of its extras.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "tokenformer needs Python 3.10 or newer with venv, but '$(PYTHON)' is `$(PYTHON) --version 2>&1 | head -n 1`;" \
	    "install it (Debian: apt install python3-venv) or name another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	@touch $(VENV)/.base $@
