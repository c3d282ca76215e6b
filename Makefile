# Two commands do everything on a fresh machine with Python 3.11 to 3.13:
#   make demo   sets up, packs the nano pair, inspects, verifies and unpacks it, prints sizes and accuracy
#   make test   sets up, runs the tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint fuzz links clean

demo: $(VENV)/.models
	$(BIN)/python examples/demo.py

test: $(VENV)/.models $(VENV)/.dev
	$(BIN)/pytest $(PYTEST_ARGS)

lint: $(VENV)/.models $(VENV)/.dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deltafmt
	cd .links && $(abspath $(BIN))/lint-imports --config ../pyproject.toml

fuzz: $(VENV)/.dev
	$(BIN)/python fuzz/fuzz_reader.py $$(mktemp -d) fuzz/corpus -max_total_time=60

# mypy and import-linter follow the package as it is installed: kernels/ and tools/ inside deltafmt/.
links:
	mkdir -p .links/deltafmt
	for part in deltafmt/*; do ln -sfn ../../$$part .links/deltafmt/; done
	ln -sfn ../../kernels .links/deltafmt/kernels
	ln -sfn ../../tools .links/deltafmt/tools

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

clean:
	rm -rf $(VENV) .links build dist *.egg-info demo-out
