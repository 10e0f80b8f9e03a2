# Each target does all its set-up: it creates .venv, installs, runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: test matrix bench docs lint clean

# Files run in their order. The reorder of xdist would leave the longest ones, which have few tests,
# for the end, where one core waits for the other.
test: $(VENV)/test.stamp lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		--no-loadscope-reorder

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

matrix: $(VENV)/test.stamp
	$(BIN)/nox $(ARGS)

bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/loss_bench.py $(ARGS)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo build/docs/index.html

$(VENV)/%.stamp: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .nox build *.egg-info
