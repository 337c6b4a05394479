# make demo | test | lint | inspect | bench: each sets up a .venv of its own first; only Python 3.10+ is needed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format inspect bench clean

demo: .venv/ready
	$(BIN)/decompk demo

test: .venv/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

inspect: .venv/ready
	$(BIN)/python tools/inspect_kernels.py
	$(BIN)/python tools/inspect_ext.py

bench: .venv/ready
	$(BIN)/python -m pytest bench --benchmark-only

.venv/ready: pyproject.toml tools/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint tools/constraints.txt --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true # what pip would do on one core; some files are templates
	@touch $@

clean:
	rm -rf .venv build *.egg-info demo-out
