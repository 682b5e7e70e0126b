# Two commands: `make demo` and `make test`. Each does its own set-up in .venv; `make help` lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= requirements/constraints.txt
# Another TransformerLens than the pinned one, or `newest`: an environment of its own, all else as pinned.
ifdef TRANSFORMER_LENS
override VENV := .venv-tl-$(TRANSFORMER_LENS)
override CONSTRAINTS := $(VENV)/constraints.txt
endif
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
# uv does not read pip's configuration; this lets it use wheels that pip knows of (a CPU build of torch, say).
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
export PIP_DISABLE_PIP_VERSION_CHECK = 1
AUDIT ?= $(UV) tool run pip-audit
install = $(UV) pip install --quiet --python $(PY) -c $(CONSTRAINTS)

.PHONY: help demo test quick test-all test-slow lint package audit docs figures constraints clean
.DEFAULT_GOAL := help
.SECONDARY:

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sims_lens needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(UV): | $(PY)
	@$(PY) -m pip install --quiet "uv>=0.9" 2>&1 | grep -v '^WARNING: Location' || true
	@test -x $(UV)

.venv-tl-%/constraints.txt: requirements/constraints.txt | $(PY)
	@sed -E 's/^transformer-lens==.*/$(if $(filter newest,$*),,transformer-lens==$*)/' $< > $@

# One stamp per group of packages: `demo` installs what the demo needs, `dev` the rest for tests and checks.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(UV)
	@echo "installing sims_lens and its '$*' packages into $(VENV) (once; about 20 seconds)"
	@$(install) -e ".[vader,jupyter]" --group $*
	@touch $@

demo: $(VENV)/.installed-demo ## the loop on the embedded model, offline; ARGS="--ranker vader" passes options on
	@$(VENV)/bin/sims-lens demo $(ARGS)

test: $(VENV)/.installed-test ## the test suite
	@$(PY) -m pytest $(ARGS)

quick: $(VENV)/.installed-test ## one case of each test, without those that take long: two minutes
	@$(PY) -m pytest --quick $(ARGS)

test-all: test ## the test suite on TransformerLens 3.9 and on 4.3
	@SIMS_LENS_SHAPES=off $(MAKE) --no-print-directory test TRANSFORMER_LENS=4.3.0

test-slow: $(VENV)/.installed-test ## the statistical tests, some minutes each
	@$(PY) -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

package: $(VENV)/.installed-test ## wheel and source archive in dist/, each tried in an empty environment (minutes; asks the package index)
	@rm -rf dist && $(UV) build --quiet --out-dir dist .
	@$(PY) -m pytest -m "slow or not slow" -n 0 tests/test_packaging.py $(ARGS)

docs: $(VENV)/.installed-docs ## the site, in docs/_build/html, offline; every warning is an error (Python 3.11 or newer)
	@$(PY) -m doctest docs/extensions/*.py
	@$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

# It asks about every pinned package. A mirror without the database finds none of them, which must not read as "none known".
audit: | $(UV) ## known vulnerabilities of the pinned packages; says so where no database can be reached
	@pinned=$$(mktemp); trap "rm -f $$pinned" EXIT; grep -vE '^(#|$$)' $(CONSTRAINTS) > $$pinned; \
	found=$$($(AUDIT) --requirement $$pinned --no-deps --disable-pip --progress-spinner off 2>&1); status=$$?; \
	missed=$$(grep -c 'could not be audited' <<< "$$found"); grep -v 'could not be audited' <<< "$$found"; \
	if grep -qE '^Found [0-9]+ known' <<< "$$found"; then exit 1; fi; \
	if [ $$status -ne 0 ] || [ $$missed -gt $$(($$(wc -l < $$pinned) / 2)) ]; then \
		echo "audit: no database of vulnerabilities can be reached from here; nothing was checked"; \
	else echo "audit: $$missed packages could not be looked up"; fi

figures: $(VENV)/.installed-dev ## docs/figures/*.png from a demo run (needs a Chromium on the machine)
	@$(PY) benchmarks/figures.py $(ARGS)

constraints: | $(UV) ## compile requirements/constraints.txt anew; the CUDA stack is left to torch's own build
	@echo "torch==2.13.0" > .torch-pin.txt; echo "transformer-lens==3.9.0" >> .torch-pin.txt
	@$(UV) pip compile --quiet --universal --python-version 3.10 pyproject.toml --all-extras --group dev --group docs \
		-c .torch-pin.txt --no-annotate --no-header -o .constraints.txt
	@{ sed -n '/^#/p' $(CONSTRAINTS); grep -vE '^(nvidia-|cuda-|triton|torch==)' .constraints.txt; echo "torch==2.13.0"; } > .new.txt
	@mv .new.txt $(CONSTRAINTS); rm -f .constraints.txt .torch-pin.txt

clean: ## remove .venv and caches (the converted model stays in the user's cache folder)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist docs/_build docs/notebooks
