# Everything lands in .venv, made by Python's own venv and pip; a second `make`
# installs nothing. Another Python beside it:
#   make test PYTHON=python3.12 VENV=.venv-3.12

SHELL := /bin/sh
# Compilers for accelerators are large, and libtpu complains wherever jax starts
# without a TPU: they get an environment of their own.
ifeq ($(MAKECMDGOALS),compile-check)
VENV ?= .venv-aot
endif
VENV ?= .venv
BIN := $(VENV)/bin
# Stamps: what the environment holds.
CORE := $(VENV)/.installed
TEST := $(VENV)/.installed-test
PEERS := $(VENV)/.installed-peers
# Which compilers: with one of the two, CHECK_ARGS names its targets.
COMPILERS ?= compile-check-gpu,compile-check-tpu
AOT := $(VENV)/.installed-$(COMPILERS)
DEMO_ARGS ?=
PYTEST_ARGS ?=
CHECK_ARGS ?=
# pytest processes; a file's tests stay together, they share what is compiled.
# Files come by name: by number of tests, the longest few would come last.
WORKERS ?= 2

# The first that is new enough, and runs: a version manager's shim may not.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help install demo test peers parity lint compile-check

help:
	@echo "make demo     train, roll out, compare: runs/demo/report.html"
	@echo "make install  the avd command: $(BIN)/avd"
	@echo "make test     all tests (some: make test PYTEST_ARGS='-k masks')"
	@echo "make parity   our modules against torch, diffusers, transformers"
	@echo "make lint     ruff: rules and format"
	@echo "make compile-check  kernels and layers, compiled for GPUs and TPUs"
	@echo "                    that are not there (4 GB of compilers, once)"

install: $(CORE)

demo: $(CORE)
	$(BIN)/avd demo --workdir runs/demo $(DEMO_ARGS)

test: $(TEST)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  --no-loadscope-reorder $(PYTEST_ARGS)

peers: $(PEERS)

parity: $(PEERS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  tests/test_*_parity.py $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

compile-check: $(AOT)
	$(BIN)/avd compile-check $(CHECK_ARGS)

$(CORE): setup.cfg pyproject.toml
	@$(make_venv)
	@echo "installing avd_jax into $(VENV): a few minutes, once"
	@$(BIN)/python -m pip install -qq --editable .
	@touch $@

$(TEST): $(CORE)
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@

# torch by itself first: asked for together with others, pip may take a build
# for GPUs where there is one for CPUs.
$(PEERS): $(TEST)
	@echo "installing torch, diffusers and transformers"
	@$(BIN)/python -m pip install -qq 'torch>=2.13'
	@$(BIN)/python -m pip install -qq --editable '.[parity]'
	@touch $@

$(AOT): $(CORE)
	@echo "installing compilers: $(COMPILERS)"
	@$(BIN)/python -m pip install -qq --editable '.[$(COMPILERS)]'
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
