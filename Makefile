# Thin: each line is a command a person would type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

# The device code on the host, csrc/emu: plain, or with the sanitizer `address` or `thread`.
EMU = -S . -G Ninja -DTK_CUDA=OFF -DTK_PYTHON=OFF -DTK_EMU=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
UNDER = $(3) env TK_EMU_LIBRARY=build/emu-$(1)/libtk_emu.so OMP_NUM_THREADS=1 $(4) \
  LD_PRELOAD=$$($(CXX) -print-file-name=$(2)) $(BIN)/python -m pytest -p no:cacheprovider tests/emu -m sanitize

.PHONY: demo test test-long bench emu sanitize gpu-check lint format dev clean

# Trains the main job and says where its picture and summary are.
demo: $(VENV)/train
	$(BIN)/tdlrt train --out runs/demo --overwrite

# OMP_WAIT_POLICY: two OpenMP pools on a busy machine otherwise stall in each other's spin barriers.
test: emu
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

test-long: emu
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'long and not gpu'

# Operators and a training step, ours beside torch's, with pytest-benchmark; `ARGS="-k tucker_conv --benchmark-autosave"`.
bench: $(VENV)/test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest bench --benchmark-enable --benchmark-columns=median,iqr,ops $(ARGS)

emu: $(VENV)/test
	$(BIN)/cmake $(EMU) -B build/emu-plain
	$(BIN)/cmake --build build/emu-plain --target tk_emu

# detect_leaks: CPython's own; setarch: ThreadSanitizer needs the addresses where it expects them.
sanitize: $(VENV)/test
	$(BIN)/cmake $(EMU) -B build/emu-address -DTK_SANITIZE=address
	$(BIN)/cmake --build build/emu-address --target tk_emu
	$(call UNDER,address,libasan.so,,ASAN_OPTIONS=detect_leaks=0)
	$(BIN)/cmake $(EMU) -B build/emu-thread -DTK_SANITIZE=thread
	$(BIN)/cmake --build build/emu-thread --target tk_emu
	$(call UNDER,thread,libtsan.so,setarch -R,TSAN_OPTIONS=halt_on_error=1)

# Everything that needs a GPU, with the machine's own python3 (torch, pytest, pybind11, cmake, ninja, nvcc): under eight minutes.
# ARGS="--out DIR --commit NAME" says where results go, and what this is where there is no git.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
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

$(VENV)/lint: $(BIN)/python constraints.txt
	$(INSTALL) ruff clang-format mypy
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info tucker_kernels/_C.*.so
