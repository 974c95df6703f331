# On a fresh machine `make report` and `make test` set up .venv first; python3, pip and venv are enough.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: report test test-all lint gpu gpu-cache compile-only check train

# A case that is made of the same as in perf/baseline is not compiled again; REPORT_OPTIONS=--compile
# compiles all cases. Ctrl-C writes what there is.
report: OUT ?= build/report
report: $(READY)
	$(RUN) -m perf report --out $(OUT) $(REPORT_OPTIONS)

# Every loss, property, layout and error once: every test, with as few cases of each as show every
# value of its parameters.
test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --part short

# All cases: those of `make test`, then the others.
test-all: test
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --part rest

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

compile-only: $(READY)
	$(RUN) -m perf compile-only

# Compiles the short compile-only table, counts launches, and holds both against perf/baseline.
# CHECK_OPTIONS='--drawn 3' compiles what the baseline does not know, and a third of the rest.
check: $(READY)
	$(RUN) -m perf check --short $(CHECK_OPTIONS)

train: $(READY)
	$(RUN) -m perf train

# For a machine with a GPU. It takes the machine's own python3, which must have torch, triton, pytest
# and pandas, and installs nothing. It takes nine minutes; whenever it is stopped, the folder has what
# was measured by then.
gpu: OUT ?= build/gpu
gpu:
	PYTHON=$(PYTHON) .ci/gpu $(OUT)

# Compiles, without a GPU, the kernels that `make gpu` launches, for a machine with this Triton and
# Python. `make gpu` unpacks build/gpu-cache.tar.xz if the wheel is the same, and else compiles.
GPU_TRITON ?= 3.6.0
GPU_PYTHON ?= 3.12
GPU_CACHE := .venv-gpu-cache
gpu-cache:
	test -x $(GPU_CACHE)/bin/python || $(PYTHON) -m venv $(GPU_CACHE)
	$(GPU_CACHE)/bin/python -m pip install --quiet --constraint constraints-dev.txt --editable . 'numpy<2.4'
	$(GPU_CACHE)/bin/python -m pip install --quiet --no-deps 'triton==$(GPU_TRITON)'
	rm -rf build/gpu-wheel
	$(GPU_CACHE)/bin/python -m pip download --quiet --no-deps --only-binary=:all: \
	  --python-version $(GPU_PYTHON) --dest build/gpu-wheel 'triton==$(GPU_TRITON)'
	$(GPU_CACHE)/bin/python -m perf gpu-cache make --wheel build/gpu-wheel/triton-*.whl

$(READY): pyproject.toml constraints-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	$(RUN) -m pip install --quiet --no-deps segmentation-models-pytorch
	touch $@
