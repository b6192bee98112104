# make demo: train, pack and run a small model    make test: all checks    make docs: the site    make format: tidy the code
# make sanitize: the GPU's tests under compute-sanitizer, TOOL=memcheck or racecheck, synccheck, initcheck
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TOOL ?= memcheck
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format docs sanitize clean

demo: $(INSTALLED)
	$(BIN)/sparse-bitnet demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sanitize: $(INSTALLED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(TOOL) --report-api-errors no --error-exitcode 1 \
		$(BIN)/python -m pytest -m gpu tests/kernels -k 'not graph'

$(INSTALLED): pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-run build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
