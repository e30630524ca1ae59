PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip writes caches under HOME, which need not exist or be writable
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch comes first and alone: with it in place, nothing else pulls in the CUDA wheels
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' requirements-dev.txt)
NATIVE := $(shell find csrc -type f 2>/dev/null)

.PHONY: help venv demo test lint fmt bench docs clean

help:
	@echo "make venv   create .venv with everything pinned and the extension built"
	@echo "make demo   prune the model that ships with the package"
	@echo "make test   run the tests; lint: check style and types; fmt: rewrite to style"
	@echo "make bench  measure the kernels; docs: check the examples; clean: remove what was built"

venv: $(VENV)/.installed

# two stamps: changing csrc/ rebuilds the extension without touching the packages
$(VENV)/.packages: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.packages pyproject.toml setup.py $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

demo: venv
	$(BIN)/liar demo

test: venv
	$(BIN)/pytest $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu,$(NATIVE))

fmt: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu,$(NATIVE))

bench: venv
	$(BIN)/liar bench gram

docs: venv
	$(BIN)/python -P -m doctest -o ELLIPSIS src/liar_ext/ops/gram.py
	@test -n "$$(ls docs/*.md 2>/dev/null)" && ls docs/*.md docs/*/*.md 2>/dev/null

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src kernels tests -name __pycache__ -prune -exec rm -rf {} +
	find src -name '_native*.so' -delete
	rm -f $(VENV)/.installed
