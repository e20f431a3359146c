# What a person does here; `make` lists it. Every target first sets up .venv: once, and again when
# the packaging or the C++ changes. Python edits need nothing.

PYTHON ?= python3
RANKS ?= 2
MEMORY ?= full
ARGS ?=
EXTRAS ?= dev
# Before all else and pinned, so that nothing below downloads another torch.
TORCH ?= torch==2.13.0

BIN := .venv/bin
# Errors show, the rest doesn't.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
CSRC := $(wildcard shardadam/csrc/*.h shardadam/csrc/*.cpp shardadam/csrc/*.cu)
READY := .venv/shardadam.stamp
PEERS := .venv/peers.stamp

# Where there is a compiler, C++ that doesn't compile is an error and not a slower install.
SHARDADAM_REQUIRE_TWIN ?= $(if $(shell command -v $${CXX:-c++}),1,0)
export SHARDADAM_REQUIRE_TWIN

# The least of: physical cores, CPUs this process may use, physical cores on macOS. Two threads on
# one core gain nothing here, and the ranks share the machine.
CORES = $(shell { lscpu -p=Core,Socket | grep '^[0-9]' | sort -u | wc -l; nproc; \
	sysctl -n hw.physicalcpu; } 2>/dev/null | sort -n | awk '$$1 > 0 { print $$1; exit }')
THREADS = $(shell echo $$(($(CORES) > $(RANKS) ? $(CORES) / $(RANKS) : 1)))

.PHONY: help setup demo test faults sanitize slurm check bench quality bench-parts docs format clean
.DELETE_ON_ERROR:

help: ## list the targets (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=python3.12         the interpreter that .venv is made with"
	@echo "TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'"
	@echo "                          another torch; this one spares the CUDA packages on Linux"
	@echo "EXTRAS=dev,cuda           for a machine with an NVIDIA GPU"
	@echo "They count when .venv is made: make clean to choose again."

setup: $(READY) ## make .venv, build the CPU kernel and install everything into .venv

.venv/torch.stamp:
	@echo "==> creating .venv and installing $(TORCH)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH)
	@touch $@

$(READY): .venv/torch.stamp pyproject.toml CMakeLists.txt $(CSRC)
	@echo "==> building the CPU kernel and installing shardadam[$(EXTRAS)], editable"
	@[ $(SHARDADAM_REQUIRE_TWIN) = 1 ] || \
		echo "    no C++ compiler found: the slower plain-torch update will run"
	@$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY) ## train a small GPT on RANKS=2 ranks, with MEMORY=full, lean or leanest; ARGS go to examples/train_gpt.py
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} exec $(BIN)/python examples/launch.py --standalone \
		--nproc-per-node $(RANKS) examples/train_gpt.py --memory $(MEMORY) $(ARGS)

test: $(READY) ## run the tests; ARGS go to pytest
	$(BIN)/pytest $(ARGS)

faults: $(READY) ## make everything go wrong, often, for a quarter of an hour, and print a table
	SHARDADAM_TEST_ALL_WORLDS=1 $(BIN)/pytest -m fault --full $(ARGS)

sanitize: $(READY) ## test the CPU kernel under ASan, UBSan and TSan, for minutes; ARGS go to pytest
	tests/sanitize.sh $(ARGS)

slurm: ## unpack Debian's SLURM into build/slurm, for tests/test_slurm.py; nothing is installed
	@mkdir -p build/slurm/packages
	@cd build/slurm/packages && apt-get -qq download \
		slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15 libmunge2
	@for package in build/slurm/packages/*.deb; do dpkg -x $$package build/slurm; done

check: $(READY) ## lint, formatting, types, and files under 400 lines
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC) tests/twin_alone.cpp
	@find $(wildcard shardadam examples benchmarks) -name '*.py' -o -path '*/csrc/*' -type f | \
		xargs wc -l | awk '$$1 > 400 && $$2 != "total" { bad = 1; print $$2 ": " $$1 \
		" lines; over 400, it wants to be two files" } END { exit bad }'

$(PEERS): $(READY)
	@echo "==> installing DeepSpeed, bitsandbytes and others to measure against and to draw with"
	@$(PIP) install --editable '.[bench]'
	@touch $@

bench: $(PEERS) ## train beside DDP, ZeRO, FSDP2 and DeepSpeed; ARGS=--quick takes two minutes
	$(BIN)/python benchmarks/peers.py $(ARGS)

quality: $(PEERS) ## coded moments beside fp32 and published ones; ARGS=--quick takes a minute
	$(BIN)/python benchmarks/quality.py $(ARGS)

bench-parts: $(READY) ## time the CPU kernel, small params, state on a disk, collectives, consolidation, checkpoints, checks, exact sums
	$(BIN)/python benchmarks/cpu_kernel.py
	$(BIN)/python benchmarks/small_params.py
	$(BIN)/python benchmarks/offload.py
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) benchmarks/collectives.py
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) benchmarks/consolidate.py
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) benchmarks/checkpoint.py
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) benchmarks/corruption.py
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) benchmarks/microbatches.py

docs: $(READY) ## build the pages and a reference from the docstrings into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(READY) ## rewrite Python and C++ as make check wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC) tests/twin_alone.cpp

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(wildcard shardadam tests examples benchmarks) -name __pycache__ -prune -exec rm -r {} +
