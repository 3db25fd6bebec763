# `make demo` and `make test` need only Python 3.10+ and make: the environment is built on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all test-gpu check clean

demo: $(READY)
	$(BIN)/kvfold demo

test: $(READY)
	$(BIN)/python -m pytest

test-all: $(READY)
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy follows no editable install that maps folders: show it the package as links
	@rm -rf build/mypy && mkdir -p build/mypy/kvfold
	@ln -s $(CURDIR)/src/kvfold/* $(CURDIR)/convert $(CURDIR)/surgery $(CURDIR)/evaluation $(CURDIR)/recipes build/mypy/kvfold/
	$(BIN)/mypy -p kvfold
	$(BIN)/python -m pytest

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kvfold needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
