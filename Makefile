# `make demo` and `make test` need Python 3.11 or newer, pip and a package index; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST_TIMM := 1.0.28

.PHONY: venv demo test test-oldest fuzz sanitize lint format bench bench-kernels-accuracy bench-auto bench-accuracy bench-features bench-equality \
	bench-families bench-tokens bench-finetune bench-survive bench-compiled bench-exported bench-serving bench-quantised \
	bench-same bench-against bench-gpu bench-gpu-kernels house families frontier names reference docs wheel test-wheel clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: venv
	mkdir -p demo
	$(BIN)/sparsify convert digits --keep 0.1 --force -o demo/model.safetensors
	$(BIN)/sparsify profile demo/model.safetensors --batch-size 8 --tree --markdown demo/profile.md --json demo/profile.json
	$(BIN)/sparsify eval demo/model.safetensors --data digits --results-file demo/eval.json
	$(BIN)/sparsify convert digits --data digits --recipe paper-digits --force -o demo/paper.safetensors
	$(BIN)/sparsify eval demo/paper.safetensors --data digits --dense digits --results-file demo/paper-eval.json
	@echo "demo: tables above, files in demo/"

# A worker that dies ends the run: xdist may wait forever for one that took its place.
TESTS := -n 2 --dist loadfile --max-worker-restart 0

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

# The oldest timm that pyproject.toml claims, over the rest of the environment.
test-oldest: venv
	rm -rf .venv-oldest
	$(BIN)/python -m pip install --quiet --no-deps --target .venv-oldest timm==$(OLDEST_TIMM)
	PYTHONPATH=.venv-oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS)

# Thousands of drawn model files, recipes, images and command lines: each is taken or refused in one line.
fuzz: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py

# Overruns and undefined behaviour of the CPU kernels on small drawn calls; needs a compiler with its sanitizers.
sanitize: venv
	$(BIN)/python tests/sanitize/run.py 1000

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Time of one attention op and of whole models, dense beside sparse, with the bars: tables in build/bench/.
bench: venv
	$(BIN)/python benchmarks/attention.py --markdown build/bench/attention.md --json build/bench/attention.json
	$(BIN)/python benchmarks/attention.py --sizes 577 --rounds 7 --no-avx2 --compile --flex \
		--markdown build/bench/attention-compiled.md --json build/bench/attention-compiled.json
	$(BIN)/python benchmarks/attention.py --batch 8 --rounds 7 --no-naive --no-avx2 \
		--markdown build/bench/attention-8.md --json build/bench/attention-8.json
	$(BIN)/python benchmarks/attention.py --by-head --rounds 41 --markdown build/bench/by-head.md --json build/bench/by-head.json
	$(BIN)/python benchmarks/model.py --markdown build/bench/model.md --json build/bench/model.json

# Predictions of the kernels beside the reference's, and what tiles do to accuracy at three image sizes.
bench-kernels-accuracy: venv
	$(BIN)/python benchmarks/kernel_accuracy.py --markdown build/bench/kernels.md --json build/bench/kernels.json

# Whether `backend=auto` takes what is fastest, on 40 shapes.
bench-auto: venv
	$(BIN)/python benchmarks/auto.py --markdown build/bench/auto.md --json build/bench/auto.json

# Accuracy and MACs of docs/results.md, from real weights and photographs (SPARSIFY_TEST_DATA, default ../shared/data).
bench-accuracy: venv
	$(BIN)/python benchmarks/accuracy.py

# Features of a second real model at 224 and 518 pixels, sparse beside dense, and what its conversion takes.
bench-features: venv
	$(BIN)/python benchmarks/features.py

# Fewer tokens: accuracy of schedules on real weights, then time of whole models; tables in build/bench/.
bench-tokens: venv
	$(BIN)/python benchmarks/tokens.py
	$(BIN)/python benchmarks/tokens_speed.py --markdown build/bench/tokens.md --json build/bench/tokens.json

# What fine-tuning brings back on real weights and photographs, label-free; an hour on two cores.
bench-finetune: venv
	$(BIN)/python benchmarks/finetune.py

# A hundred kills (SIGKILL) of the commands that write: nothing half-written, nothing left over, trainings bit-equal.
bench-survive: venv
	$(BIN)/python benchmarks/survive.py

# The speed of this checkout against another one, OLD=DIR, in one interleaved run.
bench-against: venv
	$(BIN)/python benchmarks/against.py --old $(OLD)

# Models under torch.compile, sparse beside dense; tables in build/bench/.
bench-compiled: venv
	$(BIN)/python benchmarks/compiled.py --markdown build/bench/compiled.md --json build/bench/compiled.json

# Converted models beside the best dense way in every runtime; about an hour on two cores. Tables in build/bench/.
bench-serving: venv
	$(BIN)/python benchmarks/serving.py --markdown build/bench/serving.md --json build/bench/serving.json

# Exported programs beside their models on real weights and photographs; ten minutes on two cores.
bench-exported: venv
	$(BIN)/python benchmarks/exported.py

# int8 models on real weights and photographs.
bench-quantised: venv
	$(BIN)/python benchmarks/quantised.py

# Fingerprints of converted files in build/bench/same.txt; BEFORE=FILE, of another checkout: stops where they differ.
bench-same: venv
	mkdir -p build/bench
	$(BIN)/python benchmarks/fingerprints.py > build/bench/same.txt
	$(if $(BEFORE),diff $(BEFORE),cat) build/bench/same.txt

# keep=1 equals dense, one model of each kind at its own image size and depth.
bench-equality: venv
	$(BIN)/python benchmarks/equality.py

# Everything that a GPU can settle, in eight minutes on one; tables in build/bench/.
bench-gpu: venv
	mkdir -p build/bench
	$(BIN)/python benchmarks/gpu.py --markdown build/bench/gpu.md --json build/bench/gpu.json

# Registers and shared memory of the Triton kernels on four GPUs, compiled without one; ten minutes on two cores.
bench-gpu-kernels: venv
	$(BIN)/python benchmarks/gpu_kernels.py --markdown build/bench/gpu-kernels.md

# The structure of the package: files, imports, parameters, lines.
house: venv
	$(BIN)/python benchmarks/house.py

# docs/families.md: which of timm's names convert, from the classes that the installed timm builds.
families: venv
	$(BIN)/python benchmarks/families.py --write

# Every one of them, small: keep=1 through the sparse op beside dense; every other name of timm refused by its name.
bench-families: venv
	$(BIN)/python benchmarks/families.py

# MHSA MACs against agreement over rank, tail and keep: docs/frontier.md and docs/frontier.png.
frontier: venv
	$(BIN)/python benchmarks/frontier.py

# The names that shells complete, after models became convertible.
names: venv
	$(BIN)/sparsify models > sparsify/models/names.new
	cut -d' ' -f1 sparsify/models/names.new > sparsify/models/names.txt
	rm sparsify/models/names.new

# docs/reference/: tables of the library, of recipes' and of headers' fields, from docstrings and types.
reference: venv
	$(BIN)/python docs/reference.py

# The documentation as a site, build/site/index.html; stops at the first broken link.
docs: venv
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

# What is published, in dist/: source distribution, and wheels with and without the CPU kernels.
wheel: venv
	$(BIN)/python -m pip install --quiet -e '.[package]'
	rm -rf dist
	$(BIN)/python release/wheel.py

# That in a fresh environment without compiler or extras. CPU_TORCH: words for pip that find the CPU build of torch.
CPU_TORCH := --extra-index-url https://download.pytorch.org/whl/cpu
test-wheel: venv
	$(BIN)/python release/try_wheel.py --pip "$(CPU_TORCH)"

clean:
	rm -rf $(VENV) .venv-oldest demo build dist *.egg-info
