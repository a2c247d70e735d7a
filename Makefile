# Everything a contributor or CI runs. Needs make and Python >= 3.11; all else goes into .venv.
#     make PYTHON=python3.12 setup     to choose the interpreter
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done
EXTRAS := dev,docs,lmms-eval
CODE := eqat_mm llava_adapters kernels eval demo scripts benchmarks tests

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-vlm demo-serve test test-all test-faults test-gpu lint format types imports options aot docs check bench bench-kernels adapters clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install eqat-mm into it, editable (reruns only when needed)

$(STAMP): pyproject.toml demo/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "eqat-mm needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 setup" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv." >&2; \
	  rm -rf .venv; exit 1; }
	@echo "Installing eqat-mm and PyTorch into .venv (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[$(EXTRAS)]' -e ./demo
	@touch $@
	@echo "Ready: $(BIN)/eqat --help"

demo: setup  ## quantize a real small model on the CPU and compare it with round-to-nearest
	@$(BIN)/eqat demo

demo-vlm: setup  ## the same for a small LLaVA: two DeepSpeed processes, scored by lmms-eval
	@$(BIN)/eqat demo-vlm

demo-serve: setup  ## vLLM for CPUs, in an environment of its own, answers questions about images from the demo LLaVA
	@$(BIN)/python scripts/demo_serve.py

test: setup  ## the default tests: offline, no GPU, a few minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

test-all: setup  ## the default and the slow tests (offline, no GPU)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not gpu and not network and not faults and not readers"

test-faults: setup  ## kills, full disks and damaged files by the hundred: tens of minutes, and a table at the end
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not gpu and not network" tests/faults

test-readers: setup  ## other engines over our folders: makes their environments (4 GB) and folders (4 GB), and holds them to the table in docs/formats.md
	$(BIN)/python -m tests.readers.environments
	$(BIN)/python -m pytest -q -n 0 -m readers tests/readers

test-gpu: setup  ## the tests that need a CUDA device
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -n auto -m gpu

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))

format: setup  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))

types: setup  ## mypy, strict
	$(BIN)/mypy

imports: setup  ## the floors: who may import whom
	$(BIN)/lint-imports --no-logo

options: setup  ## write down the options of all commands, which --help reads
	$(BIN)/python scripts/write_options.py

aot: setup  ## compile every Triton kernel, sm_80 to sm_120, without a GPU; a spill is an error
	cd kernels && ../$(BIN)/python -m eqat_kernels.aot

docs: setup  ## build the site of docs/ into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types imports test aot docs  ## everything CI runs

bench: setup  ## speed and memory of the training paths, as ratios
	$(BIN)/python benchmarks/run.py

adapters: setup  ## try every adapter as a user would, and write the table of docs/adding_a_model.md; most of an hour
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/adapters.py --write

bench-kernels: setup  ## speed of the kernels, as ratios; on the CPU where there is no GPU
	$(BIN)/python benchmarks/time_kernels.py

clean:  ## remove caches and build leftovers (keeps .venv and runs/)
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
