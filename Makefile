.PHONY: help bad-inputs bench compare compare-full test test-oldest test-distributed test-vllm test-llama-cpp
.PHONY: test-lm-eval bench-vllm results quality style clean
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := dev,quantization
SELECTED :=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm
CODE := trl_tinylora recipes tests docs
BENCHMARKS := build step merge fidelity many_adapters imports saved quantised shared_batch
# ruff reads no setup.cfg, so its options stand here.
RUFF := --line-length 120 --target-version py310
RULES := --select E,F,I,W,B,UP,RUF100 --ignore B028,UP007,UP035,UP045 --config 'lint.isort.lines-after-imports=2'

help:
	@echo "make compare       RL against SFT on the toy, quick preset"
	@echo "make compare-full  every arm, size and control, 3 seeds; within an hour on two cores"
	@echo "make test          the tests, on CPU, without network"
	@echo "make test-oldest   the same, in one process, with the oldest versions that setup.cfg allows, in another environment"
	@echo "make test-distributed  every launcher, tying, checkpointing and accumulation; about half an hour"
	@echo "make test-vllm     with the real vLLM on a CPU, in an environment of its own"
	@echo "make test-llama-cpp  llama.cpp reads exported adapters; builds it in ten minutes, in .venv-llama-cpp"
	@echo "make test-lm-eval  lm-evaluation-harness evaluates an adapter, and its filters grade as ours; in .venv-lm-eval"
	@echo "make bench         every row of docs/benchmarks.md; on a quiet machine"
	@echo "make bench-vllm    what vLLM samples, merged weights beside the adapter; SMOLLM2=FOLDER measures a real model too"
	@echo "make results       tables, figures and the tree of files in README and docs, from the committed JSON"
	@echo "make bad-inputs    counts the bad inputs that the tests try, by kind"
	@echo "make quality       linter; make style fixes what it can"

$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

# Without their dependencies: vLLM's metadata asks for image and audio packages that text models never import.
$(VLLM)/.installed: setup.cfg pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

compare: $(INSTALLED)
	$(BIN)/python recipes/compare.py --config recipes/toy/compare_quick.yaml

compare-full: $(INSTALLED)
	$(BIN)/python recipes/compare.py --config recipes/toy/compare.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(SELECTED)

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=dev SELECTED="--ignore tests/distributed"

test-distributed: $(INSTALLED)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -v -m slow tests/distributed

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/with_vllm tests/unit/vllm

# llama-cpp-python is built from source, with a compiler and CMake.
test-llama-cpp:
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' llama-cpp-python
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-llama-cpp/bin/python -m pytest tests/with_llama_cpp

# lm-evaluation-harness in a second step: it takes an older python-dateutil than the one of constraints.txt.
test-lm-eval:
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	.venv-lm-eval/bin/python -m pip install --quiet 'lm_eval==0.4.13'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lm-eval/bin/python -m pytest tests/with_lm_eval

bad-inputs: $(INSTALLED)
	$(BIN)/python docs/bad_inputs.py

bench: $(INSTALLED)
	for name in $(BENCHMARKS); do \
		OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python recipes/benchmark.py $$name || exit 1; \
	done
	OMP_NUM_THREADS=1 $(BIN)/python recipes/benchmark.py step --dtypes bfloat16 --hidden 256 --intermediate 1024 \
		--key_values 64 --repeats 9 --output recipes/benchmarks/results/step_bfloat16.json
	if [ -n "$(SMOLLM2)" ]; then \
		OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python recipes/benchmark.py shared_batch --model $(SMOLLM2) \
			--data recipes/smollm2-135m-arithmetic/data --name SmolLM2-135M-Instruct --repeats 3 \
			--output recipes/benchmarks/results/shared_batch_smollm2.json; \
	fi
	$(BIN)/python recipes/benchmark.py harness --update_docs docs/benchmarks.md --update_readme README.md

# SMOLLM2: a folder of SmolLM2-135M-Instruct in float32, if there is one.
bench-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python recipes/benchmark.py sampling --prompts 48
	if [ -n "$(SMOLLM2)" ]; then \
		OMP_NUM_THREADS=1 $(VLLM)/bin/python recipes/benchmark.py sampling --model $(SMOLLM2) --dtypes float32 \
			--prompts 12 --output recipes/benchmarks/results/sampling_smollm2.json; \
		OMP_NUM_THREADS=1 $(VLLM)/bin/python recipes/benchmark.py sampling --model $(SMOLLM2) --dtypes bfloat16 \
			--prompts 2 --repeats 3 --output recipes/benchmarks/results/sampling_smollm2_bfloat16.json; \
	fi

results: $(INSTALLED)
	$(BIN)/python recipes/compare.py --config recipes/toy/compare.yaml --output_dir recipes/toy/results --report_only \
		--update_readme README.md
	$(BIN)/python recipes/compare.py --config recipes/toy/compare_es.yaml --output_dir recipes/toy/evolution --report_only
	$(BIN)/python recipes/compare.py --config recipes/toy/compare_rates.yaml --output_dir recipes/toy/rates --report_only
	$(BIN)/python recipes/benchmark.py harness --update_docs docs/benchmarks.md --update_readme README.md
	$(BIN)/python recipes/tables.py
	$(BIN)/python docs/tree.py
	$(BIN)/python docs/bad_inputs.py --update
	$(BIN)/python docs/tried.py --update
	$(BIN)/python docs/gradings.py --update

quality: $(INSTALLED)
	$(BIN)/ruff check $(RUFF) $(RULES) $(CODE)
	$(BIN)/ruff format $(RUFF) --check $(CODE)

style: $(INSTALLED)
	$(BIN)/ruff check $(RUFF) $(RULES) --fix $(CODE)
	$(BIN)/ruff format $(RUFF) $(CODE)

clean:
	rm -rf .venv .venv-* *.egg-info results outputs
