# Every target makes its own environment in .venv; `make` alone lists the targets.
SHELL := /bin/sh
# A Python 3.11, 3.12 or 3.13; left empty, the first one found.
PYTHON ?=
PRESET ?= tiny
BIN := .venv/bin
NBSTRIPOUT := $(BIN)/nbstripout --keep-id --extra-keys \
	"metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets"

.DEFAULT_GOAL := help
.PHONY: help setup book single check-book links test slow mutants bench lint format lock vendor base results claims clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: .venv/.complete  ## make .venv with everything in it (automatic)

# The stamp is there only when the last installation finished: without it the environment is made afresh.
.venv/.complete: requirements.lock pyproject.toml
	@for python in $(or $(strip $(PYTHON)),python3 python3.11 python3.12 python3.13 python); do \
		if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
			>/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "make: no Python 3.11, 3.12 or 3.13 with venv: install one, or name it: make PYTHON=python3.12" >&2; \
		exit 1; \
	fi; \
	if [ ! -f $@ ]; then "$$found" -m venv --clear .venv; fi
	@rm -f $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation -e .
	@# Once here, not in every process that may not write bytecode; some packages hold templates that do not compile.
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

book: setup  ## execute every notebook (PRESET=tiny) and build the HTML
	@$(BIN)/python -m sftrl_utils.cli book --preset $(PRESET)
	@echo "The book is at _build/html/index.html"

single: setup  ## the same book as one page, to read or print offline: _build/singlehtml/index.html
	@$(BIN)/python -m sftrl_utils.cli book --preset $(PRESET) --single
	@echo "The book is at _build/singlehtml/index.html"

check-book: book  ## open every page in a headless Chromium and say what is wrong with it; screenshots in _build/shots
	@$(BIN)/python tests/check_book.py _build/html --shots _build/shots

links: setup  ## look every link to another site up: needs the network
	@$(BIN)/python -m sftrl_utils.cli book --preset smoke
	@SFTRL_EXECUTED=_build/executed/smoke $(BIN)/jupyter-book build . --path-output . --builder linkcheck

test: setup  ## run all tests with coverage
	@$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-report=html \
		&& echo "All tests passed; coverage by line is at _build/coverage/index.html" \
		|| { status=$$?; echo "make test: failed, see above (pytest exit status $$status)" >&2; exit $$status; }

slow: setup  ## run the tests of full-size models (minutes, 12 GB of memory, a download from PyPI)
	@$(BIN)/python -m pytest -n 0 -m slow

mutants: setup  ## break every public function of the theory and name the test that notices (minutes)
	@$(BIN)/python tests/mutants.py

bench: setup  ## time the trainers beside plain TRL into _build/bench.json (CASES="grpo sft eval start-up")
	@$(BIN)/python tests/bench/bench.py $(CASES)

lint: setup  ## check style, and that notebooks hold no outputs
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(NBSTRIPOUT) --verify notebooks/*.ipynb

format: setup  ## mend what `make lint` can complain of
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(NBSTRIPOUT) notebooks/*.ipynb

# torch's local suffix (+cpu, +cu130) says which build this machine has; the lock is for all machines.
lock: setup  ## write requirements.lock again from pyproject.toml (UPGRADE=--upgrade for newer versions)
	@CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --strip-extras --all-extras --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate $(UPGRADE) \
		--output-file requirements.lock pyproject.toml
	@sed -i.part 's/^\(torch==[^+]*\)+.*/\1/' requirements.lock && rm requirements.lock.part
	@echo "requirements.lock is up to date"

# Versions and checksums are in book/package.json and its lock. Of MathJax only what a page with TeX can ask for.
VENDOR := book/_static/vendor
NPM := book/node_modules
FONT := $(NPM)/@fontsource-variable/source-sans-3
vendor:  ## copy MathJax and the font into book/_static/vendor again, from npm
	npm ci --prefix book --ignore-scripts --no-audit --no-fund
	rm -rf $(VENDOR)
	mkdir -p $(VENDOR)/mathjax/output/chtml/fonts $(VENDOR)/mathjax/input/tex $(VENDOR)/source-sans-3
	cp $(NPM)/mathjax/LICENSE $(NPM)/mathjax/es5/tex-mml-chtml.js $(VENDOR)/mathjax
	cp -R $(NPM)/mathjax/es5/output/chtml/fonts/woff-v2 $(VENDOR)/mathjax/output/chtml/fonts
	cp -R $(NPM)/mathjax/es5/input/tex/extensions $(VENDOR)/mathjax/input/tex
	cp $(FONT)/LICENSE $(FONT)/files/source-sans-3-latin-wght-*.woff2 $(FONT)/files/source-sans-3-greek-wght-*.woff2 \
		$(VENDOR)/source-sans-3
	rm -rf $(NPM)

base: setup  ## pre-train the embedded base model again into data/base (a quarter of an hour)
	$(BIN)/sftrl base --to data/base

results: setup  ## run the published experiments again, tables into data/results (hours)
	@sh data/results.sh

claims: setup  ## compute the verdict of every claim, and check that the pages quote no other
	@$(BIN)/sftrl claims

clean:  ## remove what was built; .venv and the trained stages in runs/ stay
	rm -rf _build .coverage* .pytest_cache .ruff_cache
