# `make help` lists the targets. PYTHON chooses the interpreter (3.11 or 3.12), VENV the folder of the environment,
# WORKERS the number of test processes, ARGS what is added to pytest's or the quickstart's command line.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/py$(subst .,,$(VERSION)).txt
PINS := pyproject.toml $(wildcard $(CONSTRAINTS))
# A stamp is written last: an environment without one is half-made (or of another Python) and is made anew.
RUNTIME := $(VENV)/.runtime-$(VERSION)
TEST := $(VENV)/.test-$(VERSION)
INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help .venv test-venv quickstart test test-slow lint format clean python

help:  ## This list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(RUNTIME)  ## The runtime in .venv, pinned by constraints/
test-venv: $(TEST)  ## The runtime and the test tools in .venv

quickstart: $(RUNTIME)  ## The main job, small: from raw files to a model that reads and draws
	$(VENV)/bin/mmgpt run quickstart $(ARGS)

test: $(TEST)  ## The fast tests
	$(VENV)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(TEST)  ## The slow tests
	$(VENV)/bin/python -m pytest -m slow -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(TEST)  ## ruff and pyright, all of them even when one finds something
	@status=0; for tool in "ruff check ." "ruff format --check ." "pyright --pythonpath $(VENV)/bin/python"; do \
	  echo "$$tool"; $(VENV)/bin/$$tool || status=1; done; exit $$status

format: $(TEST)  ## Let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## Remove the environment, caches and builds; data/ and runs/ stay
	rm -rf .venv build dist-wheels *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@case "$(VERSION)" in \
	  3.11|3.12) ;; \
	  "") echo "mmgpt needs Python 3.11 or 3.12, and '$(PYTHON)' does not run. Choose one: make PYTHON=python3.12 ..." >&2; exit 1 ;; \
	  *) echo "mmgpt needs Python 3.11 or 3.12, and '$(PYTHON)' is $(VERSION). Choose one: make PYTHON=python3.12 ..." >&2; exit 1 ;; \
	esac

$(RUNTIME): $(PINS) | python
	@if [ -e $(VENV) ] && [ -n "$$(ls -A $(VENV))" ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	  echo "$(VENV) exists and is no virtual environment; it stays as it is. Choose another folder: make VENV=..." >&2; exit 1; fi
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) -e .
	@touch $@

$(TEST): $(RUNTIME)
	$(INSTALL) -e '.[test]'
	@touch $@
