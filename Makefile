# The commands of this project; continuous integration runs the same commands (.ci/run).
PYTHON ?= python3
DEVICE ?= auto
MINUTES ?= 30
TRITON ?= 3.9.0
BIN := .venv/bin
# One case per code path of the kernels; all cases would take an hour under a sanitizer.
SANITIZED := mixed or drafts or fp8 or sinks or head-80 or head-192 or page-16 or qwen2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-gpu test-033 sweep soak faults sanitize compile lint format bench lock wheel
.PHONY: clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## create .venv with vLLM for this machine (PYTHON=python3.12, DEVICE=cpu|cuda to choose)
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or later is needed: there is no $(PYTHON)."; exit 1; }
	@$(PYTHON) deploy/setup/environment.py --device $(DEVICE)

demo: setup ## serve SmolLM2-135M, dense and with the backend, and ask it for what a long text hides
	@$(BIN)/vllm-power demo

test: setup ## all tests (GPU tests are skipped without a GPU)
	@# Engines and servers need all cores; the other tests use one each. tests/soak takes 15 minutes: make faults.
	$(BIN)/pytest -m "not e2e" --numprocesses auto --dist loadfile --durations=20
	$(BIN)/pytest -m e2e --ignore tests/soak --durations=20

test-fast: setup ## tests that start no engine
	$(BIN)/pytest -m "not e2e" --numprocesses auto --dist loadfile

test-gpu: setup ## tests on an NVIDIA GPU: native kernels, and the engine
	$(BIN)/pytest -m gpu

sweep: setup | build/torchvision ## serve a tiny model of every architecture of vLLM's registry, and make docs/models.md (an hour; resumes)
	cd tests && PYTHONPATH=$(CURDIR):$(CURDIR)/build/torchvision $(CURDIR)/$(BIN)/python -m sweep

# The processors of multimodal models import torchvision. PyPI's build for torch 2.13 has operators that need CUDA's
# libraries. The processors use none of them, so only what describes these operators to torch.compile has to go.
build/torchvision: | setup
	$(BIN)/pip install --quiet --no-deps --target $@ torchvision==0.28.0
	@: > $@/torchvision/_meta_registrations.py

soak: setup ## load of every kind on a server on the CPU, then every answer again alone (MINUTES=30 of load)
	cd tests && PYTHONPATH=$(CURDIR) $(CURDIR)/$(BIN)/python -m soak --minutes $(MINUTES) --folder $(CURDIR)/build/soak

faults: setup ## two minutes of the soak, and faults under load: killed processes, SIGTERM, full disks
	$(BIN)/pytest tests/soak

test-033: setup | build/vllm-0.33.0 ## tests that need no kernels, under vLLM 0.33, which has no CPU build
	VLLM_TARGET_DEVICE=cpu PYTHONPATH=$(CURDIR)/build/vllm-0.33.0 $(BIN)/pytest -m without_kernels \
		--numprocesses auto --dist loadfile --durations=10

# Only its Python is used, in front of the vLLM of .venv, whose packages it shares; .venv lacks only orjson.
build/vllm-%: | setup
	$(BIN)/pip install --quiet --no-deps --target $@ vllm==$* orjson

sanitize: setup ## compute-sanitizer's memcheck, initcheck and racecheck over the kernels on an NVIDIA GPU
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/pytest -q tests/kernels -k "$(SANITIZED)"
	compute-sanitizer --tool initcheck --error-exitcode 1 $(BIN)/pytest -q tests/kernels -k "$(SANITIZED)"
	@# Without the Hopper kernel: racecheck reports how Triton starts its roles (docs/kernels-notes.md).
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/pytest -q tests/kernels -k "($(SANITIZED)) and not qwen2"

compile: setup ## compile every kernel without a GPU, under another Triton (TRITON=3.9.0 to choose)
	$(BIN)/pip install --quiet --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python tests/support/offline.py 80 90 100 120

lint: setup ## ruff, mypy, layers and language
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy vllm_power
	@# import-linter looks only into folders with an __init__.py, which kernels/ does without (CONTRIBUTING.md).
	@rm -rf build/layers && mkdir -p build/layers && cp -rL vllm_power build/layers/
	@touch build/layers/vllm_power/kernels/__init__.py
	@cd build/layers && $(CURDIR)/$(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache
	$(BIN)/pytest -q tests/test_language.py

format: setup ## fix and format the code with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## compare with vLLM's dense attention on this machine's CPU
	$(BIN)/vllm-power bench cpu

lock: ## resolve the CPU environment into deploy/setup/cpu.lock
	$(PYTHON) deploy/setup/lock.py

wheel: setup ## build the wheel into dist/
	@rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environment, builds and caches
	rm -rf .venv build dist *.egg-info deploy/setup/*/build deploy/setup/*/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
