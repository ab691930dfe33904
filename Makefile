# Everything lands in .venv, made by Python's own venv and pip; a second `make`
# installs nothing. Another Python beside it:
#   make test PYTHON=python3.12 VENV=.venv-3.12

SHELL := /bin/sh
VENV ?= .venv
BIN := $(VENV)/bin
# Stamps: what the environment holds.
CORE := $(VENV)/.installed
TEST := $(VENV)/.installed-test
DEMO_ARGS ?=
PYTEST_ARGS ?=
# pytest processes; a file's tests stay together, they share what is compiled.
WORKERS ?= 2

# The first that is new enough, and runs: a version manager's shim may not.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help install demo test lint

help:
	@echo "make demo     train, roll out, compare: runs/demo/report.html"
	@echo "make install  the avd command: $(BIN)/avd"
	@echo "make test     all tests (some: make test PYTEST_ARGS='-k masks')"
	@echo "make lint     ruff: rules and format"

install: $(CORE)

demo: $(CORE)
	$(BIN)/avd demo --workdir runs/demo $(DEMO_ARGS)

test: $(TEST)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

$(CORE): setup.cfg pyproject.toml
	@$(make_venv)
	@echo "installing avd_jax into $(VENV): a few minutes, once"
	@$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(TEST): $(CORE)
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@

# An environment that works is kept, whoever made it.
define make_venv
$(BIN)/python -m pip --version >/dev/null 2>&1 && exit 0; \
python="$(PYTHON)"; \
fail() { echo "error: $$*" >&2; exit 1; }; \
[ -n "$$python" ] || fail "no Python 3.11 or newer found; install one, or" \
  "name it: make PYTHON=/path/to/python3"; \
"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || fail "PYTHON=$$python is not Python 3.11 or newer"; \
"$$python" -c 'import ensurepip, venv' 2>/dev/null \
  || fail "$$python cannot make environments (it lacks venv or ensurepip);" \
  "on Debian or Ubuntu: apt install python3-venv"; \
echo "making $(VENV) with $$("$$python" --version)"; \
"$$python" -m venv $(VENV)
endef
