# Everything on a fresh machine: each target makes the virtual environment it needs.
#
#   make quickstart   compress MiniLM on BBC headlines to a fifth of the latency, a ninth of the size
#   make test         the test suite
#   make test-slow    the tests it leaves out: minutes each
#   make check        lint, types, import contract
#   make bench        the benchmarks whose figures the docs quote

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile \
          --constraint constraints.txt
STUDY  ?= runs/quickstart

.PHONY: quickstart test test-slow check bench clean

# A stamp per set of extras: `make quickstart` does not install the test tools.
$(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$*]'
	touch $@

quickstart: $(VENV)/.quickstart
	$(BIN)/autocomp search search_spaces/quickstart.yaml --study $(STUDY)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
