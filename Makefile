# make bench · make test · make test-all · make lint · make docs · make gpu: each works alone on a
# fresh clone.

PYTHON ?= python3
# Plain `torch` may bring several GB of CUDA libraries: without an NVIDIA GPU one version that has
# a CPU build is taken; with one, the torch that PYTHON already has, or the newest.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
BIN := .venv/bin
OUT ?= build/gpu-archive
MINUTES ?= 8
HAS_TORCH = $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
GPU_PYTHON = $(if $(HAS_TORCH),$(PYTHON),$(BIN)/python)

.PHONY: bench test test-all slow-test lint docs gpu clean

bench: .venv/ready
	$(BIN)/fastdiff bench

# products of cases by a pairwise cover (tests/covered.py); test-all, which .ci/run calls, runs all
# of each, and the tests that take long
test: .venv/ready
	$(PYTEST) -m "not slow and not product"

test-all: .venv/ready
	$(PYTEST) -m "not slow"

slow-test: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# build/site/index.html; exits with 1 where a link, a page or a reference is missing
docs: .venv/ready
	$(BIN)/python -m tools.site_build

# offline, with the interpreter that has torch and nothing of its own: benchmarks/offline.py
gpu: $(if $(HAS_TORCH),,.venv/ready)
	$(GPU_PYTHON) benchmarks/offline.py build/offline
	PYTHONPATH=build/offline:.:$$PYTHONPATH $(GPU_PYTHON) -P -m benchmarks.gpu \
	  --out $(OUT) --minutes $(MINUTES) $(if $(DRY),--dry-run) $(if $(ONLY),--only $(ONLY)) $(if $(WARM),--warm $(WARM))

.venv/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -d .venv || $(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@$(BIN)/fastdiff env | grep "C++ compiler" || true
	touch $@

clean:
	rm -rf .venv build dist
