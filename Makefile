# Baton. `make` lists what there is; every target sets up what it needs, once.

PYTHON ?= python3# any Python from 3.11 on, used to make the environments
JOBS   ?= 2#       test processes
SEEDS  ?= 1000#    simulated incidents
MODEL  ?=#         a checkpoint folder or hub id; unset: the demo model in demo/
RESULTS ?= $(lastword $(sort $(wildcard bench/results/*-gpu-engines*.json)))# what is drawn
ARGS   ?=#         more arguments for test, demo, up, bench and sim

BIN       := .venv/bin
PY        := $(BIN)/python
PROTO_PY  := .venv-proto/bin/python
READY     := .venv/.ready
PROTOGEN  := .venv-proto/.ready
MODEL_ARG := $(if $(strip $(MODEL)),--model '$(strip $(MODEL))')
# A Python that was named has what is needed itself (a GPU machine's, say): nothing is set up for it.
NEEDS     := $(if $(filter command line,$(origin PY)),,$(READY))
ROOTS     := $(CURDIR):$(CURDIR)/proto:$(CURDIR)/kernels:$(CURDIR)/clients:$(CURDIR)/sim
GPU_ENV   := PYTHONPATH="$(ROOTS):$$PYTHONPATH" PYTHONUNBUFFERED=1
PIP       := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test check lint types imports api stubs fix proto baseline bench bench-gpu test-gpu plot sim clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  \033[1mmake %-10s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make the environment .venv with everything in it

demo: $(READY) ## Serve a small model and stream three answers at once [MODEL=path]
	$(PY) demo/run.py $(MODEL_ARG) $(ARGS)

up: $(READY) ## Start the local stack in the background [MODEL=path]
	$(BIN)/baton up --detach $(MODEL_ARG) $(ARGS)

down: $(READY) ## Stop the stack that `make up` started
	$(BIN)/baton down

test: $(READY) ## Run every test [ARGS='tests/core -k prefix' JOBS=2]
	$(PY) -m pytest -n $(strip $(JOBS)) $(ARGS)

check: lint types imports api stubs ## Run the five checks below

lint: $(READY) ## Check style and format
	$(BIN)/ruff check --output-format concise
	$(BIN)/ruff format --check --output-format concise

types: $(READY) ## Check types, strictly
	$(BIN)/mypy

imports: $(READY) ## Check which package may import which
	$(BIN)/lint-imports --no-logo

api: $(READY) ## Check that the API is well described and breaks no client
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb

stubs: $(PROTOGEN) ## Check that the Python stubs are those of the .proto files
	$(PROTO_PY) proto/generate.py --check

fix: $(READY) ## Format the code and mend what the linter can mend itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(PROTOGEN) ## Generate the Python stubs from the .proto files
	$(PROTO_PY) proto/generate.py

baseline: $(READY) ## Record the API as it is now: what later changes may not break
	$(BIN)/buf build proto --exclude-source-info -o proto/baseline.binpb

bench: $(READY) ## Measure scheduler cost, throughput, streaming and first tokens
	$(PY) bench/scheduler.py $(ARGS)
	$(PY) bench/throughput.py $(ARGS)
	$(PY) bench/streaming.py $(ARGS)
	$(PY) bench/first_token.py $(ARGS)

bench-gpu: $(NEEDS) ## Measure Baton beside vLLM on this machine's GPU [VLLM_SITE=dir PY=python3]
	$(GPU_ENV) $(PY) bench/gpu.py $(ARGS)

test-gpu: $(NEEDS) ## Run the tests that need a GPU, kernels at full size among them [PY=python3]
	$(GPU_ENV) $(PY) -m pytest -q -p no:xdist -o addopts=--import-mode=importlib \
		-o python_files='check_*.py gpu_*.py' tests/kernels/device $(wildcard tests/gpu) $(ARGS)

plot: $(READY) ## Draw a result of bench-gpu for the README [RESULTS=file]
	$(PY) bench/plot.py $(RESULTS) docs/speed.png

sim: $(READY) ## Run the production core against a hostile network [SEEDS=1000]
	$(PY) -m baton_sim --seeds $(strip $(SEEDS)) $(ARGS)

clean: ## Remove the environments, builds and caches
	rm -rf .venv .venv-proto build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "Setting up .venv (once, a minute or two)"
	@$(PYTHON) -m venv .venv
	@$(PY) $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(PROTOGEN): proto/requirements.txt
	@echo "Setting up .venv-proto (once, a few seconds)"
	@$(PYTHON) -m venv .venv-proto
	@$(PROTO_PY) $(PIP) -r proto/requirements.txt
	@touch $@
