# Every target sets up what it needs: `make reproduce-xattention` works on a fresh clone.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= embedded
VENV ?= .venv
# Extra words for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu".
PIP_ARGS ?=
REPRO := $(VENV)/bin/python -m repro
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce-all report verify bench test test-slow test-chaos lint clean

help: ## Show this list.
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 24

setup: $(VENV)/.ready ## Make .venv with all that the embedded profiles and the tests need.

# torch first and by exact version: a range may take a build with gigabytes of CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes, once)"
	@test -n "$(PYTHON)" || { echo "setup: python must be 3.11 or newer, got none; set PYTHON="; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: python must be 3.11 or newer, got $$($(PYTHON) -V); set PYTHON="; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)" 2> >(grep -v 'WARNING: Location' >&2)
	@$(PIP) -e '.[cluster,search,dev]' 2> >(grep -v 'WARNING: Location' >&2)
	@touch $@

reproduce-all: $(addprefix reproduce-,$(basename $(notdir $(wildcard manifests/*.yaml)))) ## All papers.

reproduce-%: setup ## Run a paper's manifest and write its tables (PROFILE=embedded|embedded-full|paper).
	$(REPRO) run manifests/$(subst -,_,$*).yaml --profile $(PROFILE)

report: setup ## Write results/ again from the stored records.
	$(REPRO) report

verify: setup ## Judge every claim; exit 1 on a broken proxy claim.
	$(REPRO) verify

bench: setup ## Time the kernels and the suite itself.
	$(REPRO) bench

test: setup ## Run the tests (minutes, no GPU, no network).
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadgroup

test-slow: setup ## Run the long tests too (training recipes).
	$(VENV)/bin/python -m pytest -q -m 'slow or not slow'

test-chaos: setup ## Kill every part of a run on a local cluster, ten rounds of each.
	$(VENV)/bin/python -m pytest -q -m 'chaos or not slow' tests/repro/test_chaos.py tests/repro/test_executors.py

lint: setup ## Check format, style and types.
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean: ## Remove the environment and caches; runs/ and results/ stay.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
