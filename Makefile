# `make train` and `make test` do everything from a fresh clone, the environment included. PYTHON chooses the
# interpreter: the default python3 has its environment in .venv, any other one in .venv-VERSION, beside it.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
# Newer than what it was installed from, or the installation is done again. Named by version: python3 may change.
INSTALLED := $(VENV)/installed-$(VERSION)

CONFIG := configs/quickstart.py
DATA := data/stdlib
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help install train test test-processes test-all test-parity lint format clean

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED)  ## make the environment (.venv; with PYTHON=..., .venv-VERSION)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(VERSION)" || { echo "error: PYTHON is '$(PYTHON)', which does not run; it takes a Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: PYTHON is '$(PYTHON)', which is Python $(VERSION); it takes a Python 3.11 or newer, as in: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[plot,test]'
	@touch $@

train: install  ## prepare the embedded corpus, train the quickstart, evaluate it, report
	$(BIN)/ttt-e2e prepare --input=stdlib --tokenizer=train:512 --output=$(DATA)
	$(BIN)/ttt-e2e train --config=$(CONFIG) --workdir=$(RUN)
	$(BIN)/ttt-e2e evaluate --workdir=$(RUN) --output=$(RUN)/evaluation
	$(BIN)/ttt-e2e report --workdirs=$(RUN) --output=$(RUN)/report
	@printf '\n%-12s %s\n' data $(DATA) run $(RUN) checkpoints $(RUN)/checkpoints metrics $(RUN)/metrics.jsonl \
	  evaluation $(RUN)/evaluation/metrics.json report $(RUN)/report/report.html | sed '/^$$/d'

# Compiling dominates, on one core each: as many workers as cores. A worker takes tests in order, so that it makes a
# file's fixtures once, until another has none left. build/NAME.xml has every test's seconds.
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal --junitxml=build/$@.xml

test: install  ## run the tests, but for the slow ones and those of processes
	$(PYTEST) -m 'not slow and not processes'

test-processes: install  ## run the tests of several processes: launchers, signals, kills, sweeps
	$(PYTEST) -m 'processes and not slow'

test-all: install  ## run all tests
	$(PYTEST)

test-parity: install  ## run the parity, gradient and Hopper kernel tests only
	$(PYTEST) -m 'not slow' tests/parity tests/inner tests/kernels/test_mosaic_gpu.py

lint: install  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove environments and caches; data/ and runs/ stay
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
