PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch comes first and alone: with it in place, nothing else pulls in the CUDA wheels
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' requirements-dev.txt)
ENGINES := $(CURDIR)/.engines
NATIVE := $(shell find csrc -type f)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))

.PHONY: help venv demo test test-slow engines lint fmt bench docs clean

help:
	@echo "make venv    create .venv: everything pinned, the extension built"
	@echo "make demo    prune the model that ships with the package"
	@echo "make test    run the tests (PYTEST_ARGS='-k gram' for some)"
	@echo "make test-slow  run those that 'make test' skips for their time"
	@echo "make engines    build llama.cpp into .engines and run tests/export with it"
	@echo "make lint    check style and types; make fmt rewrites to style"
	@echo "make bench   measure the kernels"
	@echo "make docs    test the examples in documents and docstrings"
	@echo "make clean   remove what was built"

venv: $(VENV)/.installed

# two stamps: a change in csrc/ rebuilds the extension and leaves the packages alone
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

# a file of tests stays in one process: what it compiles or prunes once is not made again
test: venv
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

# minutes for each at widths of real models
test-slow: venv
	$(BIN)/pytest -n 2 --slow -m slow $(PYTEST_ARGS)

# with what is in .engines: llama.cpp itself (its sources have the converter), torchao
engines: $(ENGINES)/.installed
	PYTHONPATH=$(ENGINES)/packages LIAR_LLAMA_CPP=$(ENGINES)/source/vendor/llama.cpp \
	  $(BIN)/pytest --slow tests/export $(PYTEST_ARGS)

# a wheel that is there already is taken: PIP_FIND_LINKS=FOLDER make engines
$(ENGINES)/.installed: requirements-engines.txt $(VENV)/.installed
	mkdir -p $(ENGINES)/source
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 \
	  $(PIP) install --quiet --upgrade --no-deps --target $(ENGINES)/packages -r $<
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python \
	  $$(grep llama-cpp-python== $<) -d $(ENGINES)
	tar -xf $(ENGINES)/llama_cpp_python-*.tar.gz --strip-components=1 -C $(ENGINES)/source
	rm $(ENGINES)/llama_cpp_python-*.tar.gz
	@touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

fmt: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: venv
	$(BIN)/liar bench gram

docs: venv
	$(BIN)/pytest -k "docs or docstring"

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src kernels tests -name __pycache__ -prune -exec rm -rf {} +
	find src -name '_native*.so' -delete
	rm -f $(VENV)/.installed
