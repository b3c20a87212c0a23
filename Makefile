PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all lint

.venv/.ready: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -e ".[dev]"
	touch $@

quickstart: .venv/.ready  ## do unlabelled pictures help? two labels a class, a few minutes
	$(BIN)/orchestrator run quickstart

test: .venv/.ready  ## unit tests, then a short core on real Ray and MLflow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/.ready  ## everything, faults and short trainings too
	$(BIN)/python -m pytest

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
