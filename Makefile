# Everything runs in .venv, which is made once from pyproject.toml.
#   make demo   the whole way on a small model, from preference pairs to a fused model
#   make check  what CI runs: lint, format, types, tests        make test   the tests alone

PYTHON ?= python3
# The tests' oracle. On Linux without a GPU the CPU build is a tenth of the download:
#   make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PIP_TORCH ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
PACKAGE := $(BIN)/.package-installed
TORCH_STAMP := $(BIN)/.torch-installed
# Small matrices: a second thread costs more than it gives.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: demo test check lint bench clean

demo: $(PACKAGE)
	$(BIN)/fpo-mlx demo $(DEMO_ARGS)

test: $(TORCH_STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint test

lint: $(TORCH_STAMP)  # the types of the torch backend are read from torch itself
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(TORCH_STAMP)
	$(BIN)/python scripts/bench/bench.py $(BENCH_ARGS)

$(PACKAGE): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

$(TORCH_STAMP): $(PACKAGE)
	$(BIN)/python -m pip install --quiet $(PIP_TORCH) '$(TORCH)'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
