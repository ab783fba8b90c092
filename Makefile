# Every target sets up its environment first if it is missing or older than its constraints.
PYTHON ?= python3
BIN := .venv/bin
# One process with every core; `accelerate launch` warns about each of these that is not said, and would use one core.
# Override for more: make pretrain LAUNCH="--config_file my.yaml"
CORES = $(shell $(BIN)/python -c 'from rezero_hf.runs import cores; print(cores())')
LAUNCH ?= --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)
READY := .venv/.ready

.PHONY: pretrain test test-wheel test-oldest torture reproduce benchmark integrations lint format clean

pretrain: $(READY)  ## train the quickstart model on this machine
	$(BIN)/accelerate launch $(LAUNCH) scripts/pretrain.py scripts/recipes/quickstart.yaml $(ARGS)

test: $(READY)  ## the whole suite, offline, on a CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-wheel: $(READY)  ## the built wheel alone, in a fresh environment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m wheel $(ARGS)

test-oldest: .venv-oldest/.ready  ## the suite on the oldest supported Transformers and torch
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto $(ARGS)

torture: $(READY)  ## kill runs at random, resume them, compare them bit for bit; ten minutes
	$(BIN)/python scripts/torture.py $(ARGS)

reproduce:  ## the paper's tables and figures: what each claims, its command and its cost
	@awk 'FNR == 1 { header = 1; print "" } !/^# / { header = 0 } header { sub(/^# /, ""); print }' \
		$$(grep -l '^study:' scripts/recipes/*.yaml)

benchmark: $(READY)  ## speed and memory beside other libraries; half an hour
	$(BIN)/python scripts/benchmark.py $(ARGS)

integrations: .venv-integrations/.ready  ## PEFT, TRL, lm-eval, ONNX Runtime, torchao and a server on one checkpoint
	.venv-integrations/bin/python scripts/integrations.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.ready: CONSTRAINTS = constraints.txt
.venv/.ready: constraints.txt
.venv-integrations/.ready: CONSTRAINTS = constraints.txt constraints-integrations.txt
.venv-integrations/.ready: constraints.txt constraints-integrations.txt
# A torch of that age comes with CUDA from PyPI on Linux, unless PIP_EXTRA_INDEX_URL names the index of CPU builds.
.venv-oldest/.ready: CONSTRAINTS = constraints-oldest.txt
.venv-oldest/.ready: constraints-oldest.txt
.venv-integrations/.ready: EXTRA = integrations
EXTRA = dev

.venv/.ready .venv-integrations/.ready .venv-oldest/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python >= 3.11 is needed; say which with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv .venv-integrations .venv-oldest build *.egg-info .pytest_cache .ruff_cache
