# Two commands do all the set-up: `make quickstart` and `make test`. Needs Python 3.11+, pip, make, git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart demo test test-slow lint types boundaries unit format clean
.DEFAULT_GOAL := quickstart

# uv lives in the private environment, nothing is installed elsewhere.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[study,dev]'
	touch $@

quickstart: $(STAMP)  ## run the quickstart study and write results/quickstart/report.html
	$(BIN)/fixstudy run examples/quickstart.yaml

test: lint types boundaries unit  ## everything that CI runs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

boundaries: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not ray" --numprocesses 2 --dist loadfile
	$(BIN)/pytest -m "not slow and ray"

test-slow: $(STAMP)  ## the tests that take minutes each
	$(BIN)/pytest -m slow

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all results
	rm -rf $(VENV) results .mypy_cache .ruff_cache .pytest_cache .hypothesis
