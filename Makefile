# Everything a newcomer and CI need. `make help` lists the targets.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO_PROMPT ?= a red apple on a blue background
DEMO_OUTPUT ?= demo
PRESET ?= cpu
DEVICE ?= cpu
RUN ?= runs/recipe
MODEL ?= weights/tiny-emoji
JOBS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n)))
OUT ?= runs/bench-gpu
SCRATCH ?= runs/bench-gpu-scratch

.PHONY: help demo train evaluate bench bench-gpu install install-test test test-slow lint format readme clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: install ## install, draw a first picture with the embedded model and print its path
	$(BIN)/ldm txt2img "$(DEMO_PROMPT)" --seed 7 --upscale embedded --output $(DEMO_OUTPUT) --overwrite

# More options of either script: make train TRAIN="--from unet", make evaluate EVALUATE="--help".
train: install ## train the embedded model again, into RUN=runs/recipe; PRESET=cpu or gpu, DEVICE=cpu or cuda
	$(BIN)/python weights/recipe/train.py --preset $(PRESET) --device $(DEVICE) --out $(RUN) $(TRAIN)

evaluate: install ## score MODEL=weights/tiny-emoji: accuracies, Fréchet distance, diversity, into runs/evaluation
	$(BIN)/python weights/recipe/evaluate.py $(MODEL) --out runs/evaluation $(EVALUATE)

# More options of either: BENCH="--help".
bench: install-test ## measure ldm beside diffusers; BENCH="--against openvino --random-weights sd15" and the like
	PYTHONPATH=tests:. $(BIN)/python -m bench $(BENCH)

# SCRATCH keeps random weights (9 GB) and compiled code for the next call.
bench-gpu: install-test ## measure all, or PARTS="tests sd15", on an NVIDIA GPU; tables and summary into OUT=runs/bench-gpu
	PYTHONPATH=tests:. $(BIN)/python -m bench.gpu --out $(OUT) --scratch $(SCRATCH) --parts "$(PARTS)" $(BENCH)

install: $(VENV)/.installed ## make the virtual environment and install ldmcli into it

install-test: $(VENV)/.installed-test

test: install-test ## install and run the tests (no GPU, no network, some minutes)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: install-test ## full-size shapes against diffusers (20 GB of memory, half an hour)
	$(BIN)/python -m pytest -m slow

lint: install-test ## ruff, import-linter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: install-test ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: install-test ## put what `ldm` prints into README.md
	$(BIN)/python tests/readme_help.py

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# Setuptools warns at length about every editable installation: what pip says is shown where it fails.
pip = $(BIN)/pip install --quiet --constraint constraints.txt --editable $(1) >$(VENV)/pip.log 2>&1 \
	|| { cat $(VENV)/pip.log; exit 1; }

# Where there is no NVIDIA driver, torch comes without 5 GB of CUDA, unless its index cannot be reached.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi)$(wildcard /proc/driver/nvidia/version),,https://download.pytorch.org/whl/cpu)
torch = $(if $(TORCH_INDEX),$(BIN)/pip install --quiet --no-deps --index-url $(TORCH_INDEX) --retries 1 --timeout 15 \
	--constraint constraints.txt torch torchvision >$(VENV)/torch.log 2>&1 || true)

# The marker files make an install happen once, and again when what is to be installed changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing ldmcli into $(VENV): about $(if $(TORCH_INDEX),1 GB (6 if torch for CPUs is not reached),6 GB), some minutes …"
	@$(torch)
	@$(call pip,.)
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing ldmcli and its test tools into $(VENV): about $(if $(TORCH_INDEX),2 GB (7 if torch for CPUs is not reached),7 GB), some minutes …"
	@$(torch)
	@$(call pip,".[test]")
	@touch $@ $(VENV)/.installed
