# Every target sets up its own environment, once. `PIP_ARGS`, `TEST_ARGS` and `BENCH_ARGS` go to pip, pytest and
# the bench that is run.
PYTHON ?= python3
PIP_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python -m
# Several processes of one thread beat one process of several on the small arrays of the tests.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test check study bench bench-stores bench-build bench-train bench-study torture docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## images to latents to teacher to student, on two CPU cores, into demo-out/
	$(VENV)/bin/dla demo --out demo-out

test: $(READY) ## run the tests
	$(ONE_THREAD) $(RUN) pytest -n 2 $(TEST_ARGS)

check: $(READY) ## lint, formatting, types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

study: $(READY) ## run the registered study of relief-digits, for hours; it goes on where it was stopped; into study-out/
	$(VENV)/bin/dla study run manifests/studies/relief-digits.yaml --out study-out
	$(VENV)/bin/dla study report study-out

bench: $(READY) ## print the figures that README and docs quote
	$(VENV)/bin/python bench/embedded.py

bench-stores: $(READY) ## print how fast stores are read, beside other libraries, each in an environment of its own
	$(VENV)/bin/python bench/stores.py --pip-args '$(PIP_ARGS)' $(BENCH_ARGS)

bench-train: $(READY) ## print what stored targets save, and what the loop around a step costs
	$(ONE_THREAD) $(VENV)/bin/python bench/train.py $(BENCH_ARGS)

bench-build: $(READY) ## print how busy a build keeps its device, and what all else costs, beside two other ways
	$(ONE_THREAD) $(VENV)/bin/python bench/build.py $(BENCH_ARGS)

bench-study: $(READY) ## print what many studies find where there is nothing to be found, and where there is something
	$(RUN) bench.calibrate_study $(BENCH_ARGS)

torture: $(READY) ## damage stores, kill builds, try bad input: what was noticed and what was not
	$(ONE_THREAD) $(RUN) tests.torture

docs: $(READY) ## write docs/reference.md, the table of sources, and the outputs that docs/ shows, anew
	$(RUN) typer cli.main utils docs --name dla | $(VENV)/bin/python -c 'import html, sys; print(html.unescape(sys.stdin.read()).strip())' > docs/reference.md
	$(RUN) dla_cache.sources.table
	$(ONE_THREAD) $(RUN) tests.walk

format: $(READY) ## put every file into the house format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean: ## remove caches and outputs; the environment in .venv stays
	rm -rf demo-out bench-out study-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find dla_cache trainer cli tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes before anything changes and comes back last: a set-up that was interrupted starts
# from an empty environment, because pip takes a half-installed package for an installed one.
$(READY): pyproject.toml constraints.txt
	@test -e $@ || { echo "setting up $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $@
	$(RUN) pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@
