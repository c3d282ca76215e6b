# Two commands do everything on a fresh machine with Python 3.11 to 3.13:
#   make demo   sets up, packs the nano pair, inspects, verifies and unpacks it, prints sizes and accuracy
#   make test   sets up, runs the tests
# make docs builds the documentation into site/.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint fuzz docs clean

demo: $(VENV)/.models
	$(BIN)/python examples/demo.py

test: $(VENV)/.models $(VENV)/.dev
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.models $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deltafmt
	$(BIN)/lint-imports

fuzz: $(VENV)/.dev
	$(BIN)/python fuzz/fuzz_reader.py $$(mktemp -d) fuzz/corpus -max_total_time=60

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[fast]'
	touch $@

$(VENV)/.models: $(VENV)/.base
	$(PIP) -e '.[transformers]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info demo-out
