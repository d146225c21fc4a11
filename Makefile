# `make` alone lists the targets. Only `setup` needs the network.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# The first Python of 3.13, 3.12, 3.11 or plain python3 that really is one of them.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup book test lint format lock results base clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with everything in it (nothing to do when nothing changed)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 found: install one or say PYTHON=/path/to/python"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

book: $(STAMP)  ## execute every notebook and build the HTML into _build/html
	@$(BIN)/sftrl book
	@echo "The book is in _build/html/index.html"

test: $(STAMP)  ## run all tests with coverage
	@mkdir -p _build
	@$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html:_build/coverage --junitxml=_build/tests.xml
	@echo "All tests passed; the coverage report is in _build/coverage/index.html"

lint: $(STAMP)  ## check code style and that notebooks carry no outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets" notebooks/*.ipynb

format: $(STAMP)  ## format the code
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

lock: $(STAMP)  ## renew requirements.lock from pyproject.toml
	$(BIN)/pip-compile --quiet --upgrade --all-extras --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --no-annotate --output-file requirements.lock pyproject.toml
	sed -i 's/+cpu$$//' requirements.lock

results: $(STAMP)  ## run the published experiments again and copy their tables to data/results (an hour)
	for seed in 0 1 2 3 4; do for pipeline in sft_then_rl rl_then_sft sft_then_sft rl_then_rl; do \
		$(BIN)/sftrl run $$pipeline -p preset tiny -p seed $$seed -p out_dir runs/published || exit 1; done; done
	$(BIN)/sftrl publish --dir runs/published --to data/results

base: $(STAMP)  ## pre-train the embedded base model again into data/base (a quarter of an hour)
	$(BIN)/sftrl base --to data/base

clean:  ## delete build products; trained stages in runs/ stay
	rm -rf _build book/_generated
