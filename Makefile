# Everything lands in .venv/, made with Python's own venv and pip; a second
# `make` installs nothing. `make demo PYTHON=/path/to/python3.12` picks one.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Workers of pytest; compiling is most of the work, and takes a core each.
WORKERS ?= 2

# The first that runs at all (a version manager's shim may not) and is new
# enough.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help install demo test lint

help:
	@echo "make demo     train, roll out and report: runs/demo/report.html"
	@echo "make install  the avd command, in $(BIN)"
	@echo "make test     all tests            (PYTEST_ARGS='-k masks')"
	@echo "make lint     ruff, check and format"

install: $(CORE)

demo: $(CORE)
	$(BIN)/avd demo --workdir runs/demo $(DEMO_ARGS)

# Compiled programs are kept between runs, and shared by the tests of one.
test: $(TEST)
	JAX_COMPILATION_CACHE_DIR="$${JAX_COMPILATION_CACHE_DIR:-$$PWD/.jax_cache}" \
	  $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

$(CORE): setup.cfg pyproject.toml
	@$(MAKE) --no-print-directory -s venv
	@echo "installing avd into $(VENV): a few minutes, once"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(TEST): $(CORE)
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# An environment that works is kept, whoever made it.
.PHONY: venv
venv:
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11 or newer found; install one, or name it:" \
	    "make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
	then echo "error: PYTHON=$$python is not Python 3.11 or newer" >&2; \
	  exit 1; fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "error: $$python cannot make environments (no venv, ensurepip);" \
	    "on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)
