# Two commands do all the set-up: `make quickstart` and `make test`. Needs Python 3.11+, pip, make, git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where this is set, as in many containers, every process would compile all of torch and Ray again: 10 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart demo reproduction test test-slow lint types boundaries unit docs format clean
.DEFAULT_GOAL := quickstart

# uv lives in the private environment, nothing is installed elsewhere.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[study,dev]'
	touch $@

quickstart: $(STAMP)  ## run the quickstart study and write results/quickstart/report.html
	$(BIN)/fixstudy run examples/quickstart.yaml

demo: $(STAMP)  ## a first report in about a minute: results/demo/report.html
	$(BIN)/fixstudy run examples/demo.yaml

reproduction: $(STAMP)  ## ours against the published figures on MNIST; needs FIXSTUDY_DATA, FIXSTUDY_REFERENCE and an hour
	$(BIN)/fixstudy run examples/reproduction.yaml
	$(BIN)/fixstudy run examples/reproduction_variants.yaml
	$(BIN)/fixstudy import-published results/published
	$(BIN)/fixstudy compare results/reproduction results/published > docs/reproduction_figures.md

test: lint types boundaries unit  ## everything that CI runs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy --num-workers 2

boundaries: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not ray" --numprocesses 2 --dist worksteal --durations 15
	$(BIN)/pytest -m "not slow and ray" --durations 15

test-slow: $(STAMP)  ## the tests that take minutes each
	$(BIN)/pytest -m slow

docs: $(STAMP)  ## the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, the site and all results
	rm -rf $(VENV) results site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
