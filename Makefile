# On a fresh machine `make report` and `make test` set up .venv first; python3, pip and venv are enough.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: report test test-all lint gpu compile-only check train

# Machine code that is made of the same as the committed one (perf/baseline) is not compiled again.
# Ctrl-C writes what there is. REPORT_OPTIONS=--compile compiles all.
report: OUT ?= build/report
report: $(READY)
	$(RUN) -m perf report --out $(OUT) $(REPORT_OPTIONS)

# Every loss, property, layout and error once: every test, with as few cases of each as show every
# value of its parameters.
test: $(READY)
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --part short

# And all other cases.
test-all: test
	$(RUN) -m pytest -n $(WORKERS) --maxprocesses 8 --part rest

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

compile-only: $(READY)
	$(RUN) -m perf compile-only

# The short compile-only table again, and launches, held against the committed ones of perf/baseline.
check: $(READY)
	$(RUN) -m perf check --short

train: $(READY)
	$(RUN) -m perf train

# With the machine's own python3, which has torch, triton, pytest and pandas: nothing is installed.
gpu: OUT ?= build/gpu
gpu:
	PYTHON=$(PYTHON) .ci/gpu $(OUT)

$(READY): pyproject.toml constraints-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $@
