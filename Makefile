# Each target does all its set-up: it creates .venv, installs, runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: test test-long matrix wheels bench docs lint clean

# Files run in their order, which has short files at the end. The reorder of xdist would leave the
# longest ones, which have few tests, for the end, where one core waits for the other.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
	--no-loadscope-reorder

test: $(VENV)/test.stamp lint
	$(PYTEST) -m "not long"

# What `make test` leaves out: whole example runs, a build with nvcc, every tile of the Triton kernels.
test-long: $(VENV)/test.stamp
	$(PYTEST) -m long

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: $(BIN)/nox
	$(BIN)/nox $(ARGS)

# sdist and wheel in dist/, and a try of the wheel in an environment without nvcc.
wheels: $(BIN)/nox
	rm -rf dist
	$(BIN)/nox --session sdist wheel smoke
	du -h dist/*

bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/loss_bench.py $(ARGS)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo build/docs/index.html

$(BIN)/nox: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) nox
	touch $@

# Hosts that ask for other versions of what the tests run with. Their losses need nothing more.
ALONE := colpali-engine pylate

$(VENV)/%.stamp: pyproject.toml setup.py constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$*]'
	$(if $(filter test,$*),$(PIP) --no-deps $(ALONE))
	touch $@

# Build products, and what the benchmark and the examples write under the names of the README. Models
# and results of your own stay.
EXAMPLES := bench-results emoji emoji-results finetune-results tiny vectors
clean:
	rm -rf $(VENV) .nox build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f llave_kernels/_cuda*.so llave_kernels/cuda_build.txt
	rm -rf $(EXAMPLES)
