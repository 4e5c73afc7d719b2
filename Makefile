# `make demo` and `make test` work on a fresh clone: they make .venv, install the pins and build the extension.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help build demo test zoo test-slow lint format types check asan cuda-check gpu bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[demo,plots,test,dev,zoo]" "$(TORCH)"
	touch $@

build: $(INSTALLED)  ## set up .venv and compile the extension where a source is newer than it
	@if [ -n "$$(find csrc -newer $(INSTALLED) -type f -print -quit)" ]; then \
		$(BIN)/pip install --quiet --no-deps --editable . && touch $(INSTALLED); fi

demo: build  ## run the main job on real data; writes demo/report.html
	$(BIN)/lrcompress demo --output demo

test: build  ## run every test
	$(BIN)/python -m pytest

zoo: build  ## run every test on every network of tests/architectures.py
	$(BIN)/python -m pytest -m "" tests/test_architectures.py --architectures-json bench/results/architectures.json

test-slow: build  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=0

lint: build  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: build  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

types: build  ## mypy --strict
	$(BIN)/mypy

check: lint types test  ## what to run before a commit

asan:  ## the native ops and the emulated CUDA kernels under ASan, UBSan and TSan
	$(MAKE) -C tests/csrc asan

cuda-check: build  ## compile the CUDA kernels; registers, spills and stack against their budgets
	$(BIN)/python tools/cuda_check.py

gpu: build  ## on a machine with a GPU: correctness, compute-sanitizer, timings
	$(BIN)/python tools/gpu_check.py

bench: build  ## all benchmarks, results into bench/results/
	$(BIN)/python bench/singular_values.py --json bench/results/singular_values.json
	$(BIN)/python bench/truncated_svd.py --json bench/results/truncated_svd.json
	$(BIN)/python bench/group_lasso.py --threads 1 --json bench/results/group_lasso.json
	$(BIN)/python bench/group_lasso_methods.py --threads 1 --json bench/results/group_lasso_methods.json
	$(BIN)/python bench/lowrank_conv2d.py --json bench/results/lowrank_conv2d.json
	$(BIN)/python bench/lowrank_conv2d_encoders.py --threads 1 --json bench/results/lowrank_conv2d_encoders.json
	$(BIN)/python bench/lowrank_linear.py --json bench/results/lowrank_linear.json
	$(BIN)/python bench/lowrank.py --compile --large --json bench/results/lowrank.json
	$(BIN)/python bench/autocorrelation.py --json bench/results/autocorrelation.json
	$(BIN)/python bench/plan.py --json bench/results/plan.json

clean:  ## remove what was built
	rm -rf build demo $(VENV) lrcompress/*.so *.egg-info
