# Thin: each line is a command a person would type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-long lint format dev clean

# Trains the main job and says where its picture and summary are.
demo: $(VENV)/train
	$(BIN)/tdlrt train --out runs/demo

# OMP_WAIT_POLICY: two OpenMP pools on a busy machine otherwise stall in each other's spin barriers.
test: $(VENV)/test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

test-long: $(VENV)/test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m long

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# Rebuilds the compiled module after a change in csrc/.
dev: $(VENV)/test
	$(INSTALL) --no-deps -e .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/train: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e '.[train]'
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/lint: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml','rb'))['project']['optional-dependencies']['lint'])")
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tucker_kernels/_C.*.so
