# Two commands for a new machine:  make quickstart   and   make test
# Each makes its own virtual environment in .venv, installs torch first, then the project, and runs.
# TORCH is what pip installs as torch. On a machine with a GPU take the line that pytorch.org gives for it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test fast lint clean

quickstart: $(VENV)/.demo
	$(BIN)/accelerate launch peftune/train.py configs/quickstart.yaml

test: lint fast
	$(BIN)/python -m pytest -m slow

fast: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo,hub,deepspeed,quantization,eval,trackers,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build dist
