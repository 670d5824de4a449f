# From nothing but git, make and Python: every target below sets up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= dit
DATASET ?= digits
# Each of the many processes of the tests would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo compare ntg evidence curves tables test test-cpu test-faults test-app soak check docs bench clean

help:  ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "PYTHON: Python 3.11 or newer is needed, found $$($(PYTHON) --version)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs,notebooks,torchjd,ode,wandb,mlflow]'
	@touch $@

install: .venv/installed  ## make .venv and install the package with all its extras

demo: .venv/installed  ## train on real digits, about 3 minutes; MODEL=dit, sit, edm, adm or ldm (vanilla beside ANT-UW)
	$(BIN)/python examples/demo.py --model $(MODEL)

compare: .venv/installed  ## all methods at the same budget, 3 seeds, paired with vanilla (half an hour)
	$(BIN)/python -m studies studies/compare.yaml --jobs 2
	$(BIN)/python -m studies.compare

ntg: .venv/installed  ## the negative-transfer gap of five methods on the digits (half an hour)
	$(BIN)/python -m studies studies/ntg.yaml --jobs 2
	$(BIN)/python -m studies.ntg runs/ntg

evidence: .venv/installed  ## excess risk over the exact denoiser, 9 methods, 8 seeds (4 hours), then make curves
	$(BIN)/python -m studies studies/evidence.yaml --jobs 2
	$(BIN)/python -m studies.evidence
	$(MAKE) curves

curves: .venv/installed  ## image quality over training steps: what docs/results lacks of it (all: 10 hours)
	$(BIN)/python -m studies studies/curves.yaml --rows docs/results/curves.jsonl --jobs 2
	$(BIN)/python -m studies.curves
	$(BIN)/python -m studies.predictors

tables: .venv/installed  ## the poster's tables; DATASET=digits, or another with ROOT=its folder
	$(BIN)/python -m studies.tables --dataset $(DATASET) $(if $(ROOT),--root $(ROOT)) --jobs 2

test: .venv/installed  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-cpu: .venv/installed  ## parity and engines again, with the arithmetic of another CPU
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -n 2 tests/parity \
	  $(addprefix tests/balancing/,test_engines.py test_engine_one_pass.py test_engine_auto.py)

test-faults: .venv/installed  ## the slow tests: kills, damaged files, every combination of settings
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests notebooks --ignore tests/app

test-app: .venv/installed  ## drive the page of `ant-lightning app` in headless Chromium
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app]' playwright
	command -v chromium > /dev/null || $(BIN)/python -m playwright install --with-deps chromium
	$(BIN)/python -m pytest -m slow tests/app -W ignore::ResourceWarning \
	  -W ignore::pytest.PytestUnraisableExceptionWarning

soak: .venv/installed  ## half an hour of training in which memory, open files and speed must stay flat
	$(BIN)/python -m benchmarks.soak

check: .venv/installed docs  ## lint, format, types, layers, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed  ## build the documentation into build/site; a broken link is an error
	$(BIN)/zensical build --clean --strict --config-file mkdocs.yml

bench: .venv/installed  ## time balancers, every method against vanilla, networks, loaders, metrics, affinity
	$(BIN)/python -m benchmarks.methods --quick
	$(BIN)/python -m benchmarks.counted_memory
	$(BIN)/python -m benchmarks.backbones
	$(BIN)/python -m benchmarks.loaders
	$(BIN)/python -m benchmarks.analysis
	$(BIN)/python -m benchmarks.adapters
	$(BIN)/python -m benchmarks.two_hosts

clean:  ## remove what the other targets made
	rm -rf .venv runs build *.egg-info
