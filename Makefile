# Targets set up what they need by themselves: a .venv, made again whenever the pins change.

PYTHON ?= python3
BIN := .venv/bin
PINS := requirements/cpu.lock
# Tests of layers that inject a fault of the catalogue stand with their layer.
FAULTS := tests/faults tests/algorithms/test_bad_traces.py tests/data/test_bad_rows.py tests/data/test_escapes.py \
	tests/model/test_remote_code.py tests/rewards/test_isolation.py tests/rewards/test_load.py \
	tests/rewards/test_math.py tests/rewards/test_scorer.py
STAMP := .venv/installed-$(shell cat $(PINS) pyproject.toml | sha256sum | cut -c1-16)

.PHONY: help setup quickstart test faults bench peer-trl lint format check-gpu-requirements clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

setup: $(STAMP) ## Make .venv with every pinned package and plait itself.

$(STAMP): $(PINS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plait needs Python 3.11 or newer")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(PINS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

quickstart: $(STAMP) ## Train SmolLM2-135M with CHORD on this machine's CPU, in minutes.
	$(BIN)/plait train quickstart --overwrite

test: $(STAMP) ## Run the tests but for the long faults; those that need a GPU skip with a reason.
	$(BIN)/python -m pytest

faults: $(STAMP) ## Run the whole catalogue of faults, the long ones too, and write docs/reliability.md.
	rm -rf build/faults && mkdir -p build/faults
	PLAIT_FAULTS_REPORT=$(CURDIR)/build/faults $(BIN)/python -m pytest $(FAULTS) -m "long or not long"
	$(BIN)/python tests/faults/write_table.py build/faults docs/reliability.md

bench: $(STAMP) peer-trl ## Measure everything and write docs/benchmarks.md; takes up to an hour.
	$(BIN)/plait bench all --out docs/benchmarks.md

peer-trl: build/peer-trl/installed ## Make the environment of TRL, the peer of benchmark B1.

build/peer-trl/installed: requirements/peer-trl.txt
	$(PYTHON) -m venv --clear build/peer-trl
	build/peer-trl/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

lint: $(STAMP) ## Format, lint, layers and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP) ## Rewrite the code in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check-gpu-requirements: $(STAMP) ## Ask pip whether the GPU pins resolve together; installs nothing.
	$(BIN)/python -m pip install --dry-run --ignore-installed -r requirements/gpu.txt

clean: ## Remove the environment and build products; runs/ stays.
	rm -rf .venv build dist src/*.egg-info
