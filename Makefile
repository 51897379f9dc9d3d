# Targets for users and CI; `make help` lists them. Everything is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CONFIG ?= configs/quickstart.yaml
PROMPT ?= def
.DEFAULT_GOAL := help
.PHONY: help train test setup check lint type audit advisories format bench torture health schema smoke clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

train: $(VENV)/.installed ## set up, train the quickstart config (CONFIG=...), print a sample
	$(BIN)/gpt-train --config $(CONFIG)
	@echo "--- a sample: gpt-infer --prompt '$(PROMPT)' ---"
	$(BIN)/gpt-infer --prompt '$(PROMPT)' --max-tokens 200 --seed 1

test: $(VENV)/.installed-dev ## run the test suite, as CI does
	$(BIN)/python -m pytest -q -n auto --dist worksteal

setup: $(VENV)/.installed-dev ## install all that development and tests need

check: lint type audit test ## lint + types + audit + tests

lint: $(VENV)/.installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.installed-dev ## mypy --strict on gpt/
	$(BIN)/mypy

audit: $(VENV)/.installed-dev ## are packages pinned, needed and without known holes, and no secrets committed; offline
	$(BIN)/python -m scripts.audit

advisories: $(VENV)/.installed-dev ## look all pins up in the PyPA's advisory database, which this clones
	rm -rf build/advisory-database
	git clone --quiet --depth 1 https://github.com/pypa/advisory-database build/advisory-database
	$(BIN)/python -m scripts.audit --database build/advisory-database

format: $(VENV)/.installed-dev ## apply ruff's format and safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev ## time start, watch, checkpoints, text, training, generation; NANOGPT=DIR TEXT=FILE: beside peers
	$(BIN)/python scripts/bench_start.py
	$(BIN)/python scripts/bench_watch.py
	$(BIN)/python -m scripts.bench_checkpoint
	$(BIN)/python -m scripts.bench_tokenize
	$(BIN)/python scripts/bench_generate.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python scripts/bench_train.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(if $(TEXT),$(BIN)/python scripts/bench_loss.py --text $(TEXT) $(if $(NANOGPT),--nanogpt $(NANOGPT)))

torture: $(VENV)/.installed-dev ## kill, damage and poison runs, and record it; TEST=2 COUNT=50: a part, CASE=7: one again
	$(BIN)/python -m scripts.torture $(if $(TEST),--test $(TEST)) $(if $(COUNT),--count $(COUNT)) $(if $(CASE),--case $(CASE))

health: $(VENV)/.installed-dev ## train runs with known faults into corpus/, and say how well they are told
	$(BIN)/python scripts/health_corpus.py make corpus
	$(BIN)/python scripts/health_corpus.py judge corpus --part apart --verbose

schema: $(VENV)/.installed ## write configs/schema.json, for editors, and gpt/cli/knobs.txt, for --help
	$(BIN)/python scripts/write_schema.py

smoke: $(VENV)/.installed ## train a tiny model for some seconds and sample from it
	rm -rf runs/smoke
	$(BIN)/gpt-train --config configs/smoke.yaml
	$(BIN)/gpt-infer --run runs/smoke --prompt 'import' --max-tokens 40

clean: ## remove caches and build products; runs/, data/ and .venv stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find gpt tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev,hub,track]'
	@touch $@ $(VENV)/.installed
