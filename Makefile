# Everything runs in .venv, which is made once, of the versions in scripts/make/requirements.lock.
#   make demo   the whole way on a small model, from preference pairs to a fused model
#   make check  what CI runs: lint, format, types, docs, tests  make test   the tests alone
#   make lock   the newest versions that pyproject.toml allows into the lock; says what changed
#   make test-newest, make test-lowest   the tests with the newest of everything that the index
#               serves, upper bounds ignored, and with the lowest that pyproject.toml allows

PYTHON ?= python3
# The tests' oracle. On Linux without a GPU the CPU build is a tenth of the download:
#   make test PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_newest ?= torch
TORCH_lowest ?= torch==$(shell sed -n 's/^torch = \["torch>=\(.*\)"\]$$/\1/p' pyproject.toml)
PIP_TORCH ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
# One more than the smallest machine has cores, as each waits for its streams now and then; each
# takes up to a gigabyte.
TEST_JOBS ?= 3
PYTEST_ARGS ?=
UV ?= uv>=0.9

BIN := .venv/bin
LOCK := scripts/make/requirements.lock
PACKAGE := $(BIN)/.package-installed
TORCH_STAMP := $(BIN)/.torch-installed
TOOLS := .venv-tools/bin
# Small matrices: a second thread costs more than it gives.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

# What the lock has versions for. python.org's Python runs as either processor's.
CHECK = -c 'import platform, sys; \
	v = sys.version_info; old = v < (3, 11) or v >= (3, 15); mac = sys.platform == "darwin"; \
	macos = platform.mac_ver()[0] if mac else ""; \
	sys.exit("Python 3.11 to 3.14 is needed, found %d.%d: make clean, make PYTHON=python3.12" % v[:2] if old else \
	"a Python for arm64 is needed: MLX has no build for Intel. On Apple silicon this one runs under Rosetta: start make with arch -arm64, or untick Open using Rosetta in the Get Info of the terminal" if mac and platform.machine() != "arm64" else \
	"macOS 14 or newer is needed, found " + macos if int(macos.partition(".")[0] or 14) < 14 else 0)'

.DELETE_ON_ERROR:
.PHONY: demo test check lint docs bench clean lock test-newest test-lowest

demo: $(PACKAGE)
	$(BIN)/python -m fpo_mlx demo $(DEMO_ARGS)

test: $(TORCH_STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

check: lint docs test

lint: $(TORCH_STAMP)  # the types of the torch backend are read from torch itself
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(PACKAGE)  # the site, in build/site; strict: a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

bench: $(TORCH_STAMP)
	$(BIN)/python scripts/bench/bench.py $(BENCH_ARGS)

lock: $(TOOLS)/uv
	$(PYTHON) $(CHECK)
	$(PYTHON) scripts/make/lock.py --uv $<

# An environment of its own each time: what was left in it from last week would hide a fault.
test-newest test-lowest: test-%: $(TOOLS)/uv
	$(PYTHON) $(CHECK)
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python scripts/make/lock.py $* --uv $< --output .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --no-build-isolation --no-deps -e .
	chflags -R nohidden .venv-$* 2>/dev/null || true
	.venv-$*/bin/python -m pip install $(PIP_TORCH) '$(TORCH_$*)'
	$(ONE_THREAD) .venv-$*/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

# In a folder that iCloud syncs a dot folder's files may be hidden, and Python skips a hidden .pth
# file, which an editable install is: chflags, which a Mac alone has, shows them.
$(PACKAGE): pyproject.toml $(LOCK)
	$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) $(CHECK)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	chflags -R nohidden .venv 2>/dev/null || true
	touch $@

$(TORCH_STAMP): $(PACKAGE)
	$(BIN)/python -m pip install $(PIP_TORCH) '$(TORCH)'
	touch $@

$(TOOLS)/uv:
	$(PYTHON) -m venv .venv-tools
	$(TOOLS)/python -m pip install '$(UV)'

clean:
	rm -rf .venv .venv-newest .venv-lowest .venv-tools build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
