# Two commands do everything, set-up included:
#   make demo   the whole DAG on the demo's data, then the report
#   make test   the test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export DAGSTER_HOME ?= $(CURDIR)/dagster_home
export TOKENIZERS_PARALLELISM ?= false

# Files of tests side by side; each process takes 2 GB. One that crashes ends the run: its files would wait for ever.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-services gpu-check benchmarks mutation docs ui mlflow clean

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create .venv with the tested versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

demo: setup  ## train and evaluate on the demo's data, then show the report
	$(BIN)/dagster asset materialize -m embed_pipeline.definitions --select 'key:"demo/*"'
	@$(BIN)/embed-pipeline report demo

test: setup  ## lint, type check and test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not services" --durations 20 $(IN_PARALLEL)

test-slow: setup  ## the tests that take longer than a minute each (CI runs them after `make test`)
	$(BIN)/python -m pytest -m slow --durations 30 $(IN_PARALLEL)

gpu-check: setup  ## on a machine with an NVIDIA GPU: its tests, its speed and its memory (five minutes)
	$(BIN)/python benchmarks/gpu_check.py

benchmarks: setup  ## measure every claim, and write the table of benchmarks/README.md anew (two hours, alone)
	$(BIN)/python benchmarks/run_all.py $(if $(INTENTS),--intents $(INTENTS))

test-services: setup  ## the deployment's services with PostgreSQL, on a quiet machine (some ten minutes; not in CI)
	$(BIN)/python -m pytest -m services --durations 10

mutation: setup  ## MODULE=evaluation.gate: which bugs put into it do its tests miss? (several minutes)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/mutmut run 'embed_pipeline.$(MODULE).*'
	$(BIN)/mutmut results

docs: setup  ## write docs/settings.md and docs/losses.md anew from the code
	$(BIN)/python -m embed_pipeline.reference docs

ui: setup  ## the Dagster UI on http://127.0.0.1:3000
	$(BIN)/dagster dev -w workspace.yaml

mlflow: setup  ## MLflow on http://127.0.0.1:5000
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(DAGSTER_HOME)/mlflow.db --host 127.0.0.1 --port 5000

clean:  ## remove what the demo made (not .venv, not your own pipelines)
	rm -rf $(DAGSTER_HOME)/store/demo embed_pipeline/defs/demo/raw
