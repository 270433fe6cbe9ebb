# Every target sets up .venv on first use, and again when pyproject.toml or constraints.txt has changed.
# Needs make and Python 3.11 or newer (the pinned versions in constraints.txt were tested with 3.11).

PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SETUP := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cross test-gpu lint bench optimum clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.compress ## compress SmolLM2-135M to 4 bits for this CPU and measure it (some minutes, 100 MB download)
	$(BIN)/edgepipe compress smollm2-135m --target cpu --bits 4

test: $(VENV)/.dev ## run the fast tests: what CI runs
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev ## run the tests that take longer
	$(BIN)/python -m pytest -m slow  # one at a time: some measure time and memory

test-cross: $(VENV)/.cross ## run bundles for other machines under qemu (Debian; a download of 230 MB the first time)
	$(BIN)/python -m tests.slow.cross_machine
	$(BIN)/python -m pytest -m slow tests/slow/test_cross.py tests/slow/test_lone_kernels.py -rs

test-gpu: $(VENV)/.gpu ## compile for NVIDIA's GPUs and run on one, here or in software (155 MB the first time)
	$(BIN)/python -m pytest -m slow tests/slow/test_gpu.py -rs

lint: $(VENV)/.dev ## check style, formatting, types and the Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

bench: $(VENV)/.bench ## run edgepipe beside its peers on the same model (an hour; the first time also their set-up)
	$(BIN)/python benchmarks/peer_setup.py
	$(BIN)/python benchmarks/peers.py

optimum: .venv-optimum/.stamp ## set up optimum's exporter in .venv-optimum, for --set export.exporter=optimum

clean: ## remove environments, caches and builds; runs/ stays
	rm -rf $(VENV) .venv-peers .venv-optimum .cross build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of extras: later ones hold the earlier ones, so no set-up takes away what another brought.
$(VENV)/.compress: $(VENV)/bin/python
	@echo "Setting up $(VENV) with [compress]: torch and transformers, some minutes the first time"
	$(PIP) --editable ".[compress]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python
	@echo "Setting up $(VENV) with [compress,eval,train,tvm,qnn,dev]: torch, transformers and the test tools, some minutes the first time"
	$(PIP) --editable ".[compress,eval,train,tvm,qnn,dev]"
	@touch $@ $(VENV)/.compress

$(VENV)/.cross: $(VENV)/.dev
	@echo "Adding [cross] to $(VENV): Zig"
	$(PIP) --editable ".[compress,eval,train,tvm,qnn,dev,cross]"
	@touch $@

$(VENV)/.gpu: $(VENV)/.dev
	@echo "Adding [cross,cuda] to $(VENV): Zig and nvcc"
	$(PIP) --editable ".[compress,eval,train,tvm,qnn,dev,cross,cuda]"
	@touch $@ $(VENV)/.cross

$(VENV)/.bench: $(VENV)/bin/python
	@echo "Setting up $(VENV) with [compress,bench]: torch, transformers and the peers, some minutes the first time"
	$(PIP) --editable ".[compress,bench]"
	@touch $@ $(VENV)/.compress

$(VENV)/.compress $(VENV)/.dev $(VENV)/.cross $(VENV)/.gpu $(VENV)/.bench: $(SETUP)

# Beside .venv, never in it: optimum-onnx wants an older transformers.
.venv-optimum/.stamp: pyproject.toml constraints-optimum.txt
	$(MAKE) --no-print-directory VENV=.venv-optimum .venv-optimum/bin/python
	@echo "Setting up .venv-optimum with [optimum]: torch and an older transformers, some minutes the first time"
	$(subst $(VENV),.venv-optimum,$(subst constraints.txt,constraints-optimum.txt,$(PIP))) --editable ".[optimum]"
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "edgepipe needs Python 3.11 or newer, and none is on the PATH: install python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) can't make a virtual environment: install its venv module (Debian: python3.11-venv)" >&2; exit 1; }
