# make demo     answer a dozen questions with a real model
# make test     every test            make check   style, types, import rules, line budget
# make fuzz     the stateful scheduler test for MINUTES (default 5)
# make soak     random load on a server for MINUTES: nothing lost, wrong or kept
# Each target makes what it needs in .venv; a second run installs nothing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
MINUTES ?= 5
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check fuzz soak install clean

demo: .venv/.runtime
	@$(BIN)/python examples/demo.py

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/loc

fuzz: .venv/.dev
	FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest --timeout 0 tests/core/test_invariants.py

soak: .venv/.dev
	$(BIN)/python scripts/soak --minutes $(MINUTES)

install: .venv/.dev

# torch comes first and alone: naming its version lets pip take the build that fits the machine.
.venv/.runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv (torch is large; this takes a few minutes the first time) ..."
	$(PIP) $(TORCH)
	$(PIP) -e '.[cpu,gguf,server]'
	@touch $@

.venv/.dev: .venv/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
