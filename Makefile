# Everything happens in .venv and runs/demo; `make clean` takes both away again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ZIG ?= $(BIN)/python -m ziglang
STAMP := $(VENV)/.installed
DEMO := runs/demo
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install install-torch install-procgen install-ziglang demo play web kernels pocket test test-torch-extra faults check-gpu bench-gpu
.PHONY: lint format lock wheel space docs clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## Create .venv with everything pinned (PYTHON=python3.12 to choose; uses uv if there)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: cwm_jax needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "       Name a newer one: make install PYTHON=python3.12" >&2; exit 1; }
ifdef UV
	test -x $(BIN)/python || uv venv --quiet --seed --python "$$(command -v $(PYTHON))" $(VENV)
	uv pip install --quiet --python $(BIN)/python -e '.[dev]' -c constraints.txt
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
endif
	@touch $@

install-torch: $(STAMP)  ## Add the pinned PyTorch, for .pt files
	$(BIN)/python -m pip install --quiet torch -c constraints.txt

install-procgen: $(STAMP)  ## Make .venv-procgen with the real game, to record data
	$(BIN)/python -c 'from cwm_jax.simulator import venv; venv.ensure()'

demo: $(STAMP)  ## Train a small model on the CPU and write a video of its rollouts
	rm -rf $(DEMO)
	$(BIN)/python train.py --config configs/debug.py --workdir $(DEMO)
	$(BIN)/python sample.py --checkpoint $(DEMO) --ddim-steps 1 \
	  --output $(DEMO)/sample.mp4 --grid $(DEMO)/grid.png
	@echo; echo "The demo is done. Look at:"
	@for file in sample.mp4 grid.png curves.png metrics.jsonl; do \
	  test -s $(DEMO)/$$file || { echo "error: $(DEMO)/$$file is missing or empty" >&2; exit 1; }; \
	  echo "  $(DEMO)/$$file"; done

play: $(STAMP)  ## Play in the browser (CHECKPOINT=runs/small to choose; else checkpoints/pocket)
	$(BIN)/python play.py $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

web: $(STAMP)  ## Build dist/web, the page that runs in the browser without a server (needs npm; CHECKPOINT=…)
	$(BIN)/python -m cwm_jax.tools.web --build $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

install-ziglang: $(STAMP)  ## Add the compiler of web/kernels.c
	$(BIN)/python -m pip install --quiet ziglang==0.17.1

KERNELS ?= web
kernels:  ## Compile web/kernels.c to web/kernels*.wasm (after make install-ziglang)
	$(call compiled,kernels.wasm)
	$(call compiled,kernels-shared.wasm,-matomics -mbulk-memory -Wl$(COMMA)--shared-memory -Wl$(COMMA)--max-memory=2147483648)

# The two files differ in their memory alone. With a stack of 0 bytes a function that needed one would fail;
# so threads that share a memory do not write over each other's.
COMMA := ,
define compiled
	$(ZIG) cc -target wasm32-freestanding -mcpu=generic+simd128 -O3 -mllvm -disable-lsr -nostdlib \
	  -Wl,--no-entry -Wl,--strip-all -Wl,--import-memory -Wl,-z,stack-size=0 $(2) \
	  -o $(KERNELS)/$(1) web/kernels.c
	@chmod 644 $(KERNELS)/$(1)
endef

# PYTHON=… on the command line is used as it is, on a machine that has the packages but no .venv.
ifeq ($(origin PYTHON),command line)
PROGRAM_PYTHON := $(PYTHON)
else
PROGRAM_PYTHON := $(BIN)/python
pocket check-gpu bench-gpu: $(STAMP)
endif

pocket:  ## Record the game, train for MINUTES (a GPU: 9; a CPU: 300), export to OUTPUT, measure; resumable
	$(PROGRAM_PYTHON) -m cwm_jax.tools.pocket \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(FRAMES),--frames $(FRAMES)) \
	  $(if $(DATA),--data $(DATA)) $(if $(WORKDIR),--workdir $(WORKDIR)) \
	  $(if $(OUTPUT),--output $(OUTPUT)) $(if $(CARD_MINUTES),--card-minutes $(CARD_MINUTES)) $(CONFIG)

test: $(STAMP)  ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -rs

test-torch-extra: install-torch  ## Run the whole suite with PyTorch, including the .pt tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10 -rs

faults: $(STAMP)  ## Inject faults into training runs for MINUTES=10 (RESULTS=FILE adds up)
	$(BIN)/python -m tests.faults --minutes $(or $(MINUTES),10) $(if $(RESULTS),--results $(RESULTS))

check-gpu:  ## Check in 2 minutes that this GPU computes the same as a CPU (PYTHON=…)
	$(PROGRAM_PYTHON) -m benchmarks.check_gpu

bench-gpu:  ## Measure this GPU in 8 minutes (PYTHON=…; ORIGINAL=DIR: also the PyTorch original)
	$(PROGRAM_PYTHON) -m benchmarks.gpu $(if $(ORIGINAL),--original $(ORIGINAL))

lint: $(STAMP)  ## Check format and lint, change nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)  ## Format the code and apply ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:  ## Update the pinned versions (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
	  --custom-compile-command 'make lock' --all-extras pyproject.toml --output-file constraints.txt

wheel: $(STAMP)  ## Build wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation

space: wheel  ## Copy the wheel to launch/space, a Hugging Face Space
	rm -f launch/space/*.whl
	cp dist/cwm_jax-*.whl constraints.txt launch/space/

docs: $(STAMP)  ## Build the documentation site into site/; any warning is an error
	$(BIN)/python -m pip install --quiet -e '.[docs]' -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## Remove .venv, the demo, caches and build files
	rm -rf $(VENV) $(VENV)-procgen $(VENV)-procgen.lock $(DEMO) build dist site launch/space/*.whl launch/space/constraints.txt *.egg-info .pytest_cache .ruff_cache .hypothesis
	-test ! -d runs || rmdir --ignore-fail-on-non-empty runs
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
