PYTHON ?= python3
VENV := .venv
# Studies that run side by side: `make studies JOBS=1` for one after the other.
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint types contracts unit docs studies benchmarks format clean
.DEFAULT_GOAL := demo

# The core: enough for the main job.
$(BIN)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	touch $@

# Everything: extras, linters, types, tests, documentation.
$(BIN)/.dev: $(BIN)/.core
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.core
	$(BIN)/layerwright optimize demo:lm --budget bits=3 -o out/demo --force

test: lint types contracts docs unit

lint: $(BIN)/.dev
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: $(BIN)/.dev
	$(BIN)/mypy

contracts: $(BIN)/.dev
	$(BIN)/lint-imports

unit: $(BIN)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not study" tests

docs: $(BIN)/.dev
	$(BIN)/mkdocs build --strict -q -d build/site

studies: $(BIN)/.dev
	$(BIN)/layerwright study all --jobs $(JOBS)

benchmarks: $(BIN)/.dev
	for name in ngram allocate decode gptq gptq_model streaming scores joint additive_attention ats chm cswin finc; do $(BIN)/python -m benchmarks.$$name || exit 1; done

format: $(BIN)/.dev
	$(BIN)/ruff check --fix -q src tests benchmarks examples; $(BIN)/ruff format -q src tests benchmarks examples

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
