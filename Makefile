# Every target does its own set-up in .venv: `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
PY := .venv/bin/python
# Two worker processes with one thread each: two thread pools on the same cores slow each other down many times over.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-slow test-extras lint docs bench-train clean

help:
	@echo "make demo       compare instruct, sft, graft and gift on the embedded pair; prints a table and the report's path"
	@echo "make test       the quick test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-extras  the tests of lm-eval and the trackers, with the packages they need (300 MB)"
	@echo "make lint       ruff"
	@echo "make setup      .venv with the locked requirements and guidetune (demo and test do this themselves)"
	@echo "make docs       write the generated pages of docs/ again"
	@echo "make bench-train  training speed beside the incumbents, 8 minutes; BENCH=--full for all of it"
	@echo "make clean      remove caches and build leftovers (keeps .venv and runs/)"
	@echo "Another interpreter: make setup PYTHON=python3.12"

setup setup-dev:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "setup: no interpreter '$(PYTHON)'; install Python 3.11 or newer, or name one: make $@ PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" tools/setup.py $(if $(filter setup-dev,$@),--dev)

demo: setup
	@$(PY) -m guidetune demo

test: setup-dev
	$(PYTEST) -m "not slow"

test-slow: setup-dev
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: there is none

test-extras: setup-dev
	@$(PY) tools/setup.py --dev --extras
	$(PYTEST) tests/tracking tests/evaluation/test_lm_eval.py tests/evaluation/test_against_lm_eval.py

lint: setup-dev
	$(PY) -m ruff check .

docs: setup
	$(PY) -m guidetune.reference

# trl is among the development requirements
BENCH ?= --quick
bench-train: setup-dev
	$(PY) benchmarks/train.py $(BENCH)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
