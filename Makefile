# make quickstart   install, then fine-tune a small model privately
# make test         install, then run the tests
# make help         all targets

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/sentiment_quickstart.yaml
# Processes that run tests side by side; each computes on one thread.
JOBS   ?= 2

# Rounds of the benchmark: with one micro-batch a step, and with eight. Few, so that it ends.
ROUNDS ?= 3 2
SCALING_ROUNDS ?= 7
RUN_ROUNDS ?= 3
# How often test-kills kills a run.
KILLS ?= 50
# Folders for bench-throughput; SST2_DATA may be a hub name.
GPT2_TOKENIZER    ?=
ROBERTA_TOKENIZER ?=
SST2_DATA         ?=

BIN     := $(VENV)/bin
# One file an installed set of extras; newer requirements install again.
RUN     := $(VENV)/installed-quickstart
DEV     := $(VENV)/installed-dev
# torch stands in the same command as the constraints: left to itself, pip may
# fetch another build of several gigabytes first and replace it afterwards.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
# Compiled; one that a failed build left behind would be used.
BUILT   := dp_trainer/privacy/_box_muller.*.so
BENCH   := $(BIN)/python scripts/benchmark.py --write docs/performance.md
TEXTS    = $(if $(GPT2_TOKENIZER),--gpt2-tokenizer $(GPT2_TOKENIZER)) \
           $(if $(ROBERTA_TOKENIZER),--roberta-tokenizer $(ROBERTA_TOKENIZER)) \
           $(if $(SST2_DATA),--sst2-data $(SST2_DATA))

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow test-kills audit test-distributed test-kernels lint format zoo adapters precision calibration configs bench bench-scaling bench-overhead bench-throughput ablation test-configs clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

quickstart: $(RUN)  ## Fine-tune a small model privately on bundled data (CONFIG=… for another run)
	$(BIN)/python scripts/finetune.py --config $(CONFIG)

test: $(DEV)  ## Run the tests, but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-slow: $(DEV)  ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-configs: $(DEV)  ## Run two steps of every config on toy models, and work out all their plans anew (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests/test_configs.py

test-kills: $(DEV)  ## Kill runs 50 times with SIGKILL and resume them; writes docs/faults.md (KILLS=… for more)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -W ignore -m faults --kills $(KILLS) --write docs/faults.md

audit: $(DEV)  ## Plant faults in runs and audit them, and correct runs too; writes docs/audit.md (some minutes)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -W ignore -m auditing --write docs/audit.md

test-distributed: $(DEV)  ## Run all tests with two and three processes (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/distributed

lint: $(DEV)  ## Check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy --strict dp_trainer

format: $(DEV)  ## Rewrite the files in the one format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

test-kernels: $(DEV)  ## Install Triton (a gigabyte) and run its kernels, on a CPU by its interpreter, beside PyTorch's operations
	$(INSTALL) -e '.[kernels]'
	OMP_NUM_THREADS=1 TRITON_INTERPRET=$$($(BIN)/python -c 'import torch; print(int(not torch.cuda.is_available()))') \
	$(BIN)/python -m pytest tests/gradients/test_kernels.py

zoo: $(DEV)  ## Hold every architecture of transformers against one sample at a time; writes docs/coverage.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m tests.zoo --jobs $(JOBS) --write docs/coverage.md

adapters: $(DEV)  ## The same for the methods of PEFT; writes docs/peft.md
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -W ignore -m adapters --write docs/peft.md

precision: $(DEV)  ## Measure norms in bfloat16; writes docs/precision.md
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore tests/precision.py --write docs/precision.md

calibration: $(DEV)  ## Time calibration and hold it against finer grids; writes docs/calibration.md (some minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -W ignore tests/calibration.py --write docs/calibration.md

configs: $(DEV)  ## Work out σ and ε of every config; writes docs/configs.md
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore tests/config_plans.py --write docs/configs.md

bench: $(DEV)  ## Time private against ordinary steps; writes docs/performance.md (ROUNDS="10 4" for more rounds)
	$(BENCH) --micro-batches 1 8 --rounds $(ROUNDS)

bench-scaling: $(DEV)  ## The same over length, micro-batch and model size
	$(BENCH) --scaling --rounds $(SCALING_ROUNDS)

bench-overhead: $(DEV)  ## Calls of a step, and what each costs
	$(BENCH) --overhead

bench-throughput: $(DEV)  ## Whole runs on text (GPT2_TOKENIZER=, ROBERTA_TOKENIZER=, SST2_DATA= add E2E and SST-2)
	$(BENCH) --throughput --rounds $(RUN_ROUNDS) $(TEXTS)

ablation: $(DEV)  ## Findings about automatic clipping at small scale; writes docs/findings.md (a quarter of an hour on one core)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python scripts/ablation.py --write docs/findings.md

clean:  ## Remove the virtual environment and caches; runs/ stays
	rm -f $(BUILT)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11; use: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt dp_trainer/privacy/box_muller.c | $(BIN)/python
	@echo "installing into $(VENV) (once; a few minutes)"
	@rm -f $(BUILT)
	$(INSTALL) -e '.[quickstart]'
	@touch $@

# The development extras include those of the quickstart.
$(DEV): pyproject.toml constraints.txt dp_trainer/privacy/box_muller.c | $(BIN)/python
	@echo "installing into $(VENV) (once; a few minutes)"
	@rm -f $(BUILT)
	$(INSTALL) -e '.[dev]'
	@touch $(RUN) $@
