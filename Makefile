# `make quickstart` and `make test` set up .venv by themselves, and skip what is done.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test faults lint

quickstart: .venv/installed
	$(BIN)/python run_bench.py experiments/quickstart.yaml

test: .venv/installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m 'not faults and not compile'

# Processes are killed and disks are filled while sweeps run, which wait for much besides the cores; and a compiler works.
faults: .venv/installed
	$(BIN)/python -m pytest -q -n 3 -m 'faults or compile'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The mark is made last, so that an interrupted installation is done again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
