# Two commands do everything on a fresh machine: `make demo` and `make test`. The rest are thin aliases.
# Needs Python 3.10 or newer with venv and headers, and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
# Wheel index for torch on a machine without a GPU; see torch.stamp.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Arguments of `make demo` after the configuration, as in DEMO_ARGS="train.epochs=1"; COMPARE=1 adds --compare.
DEMO_ARGS ?=
# Arguments of `make test` for pytest: `PYTEST_ARGS=` adds the slow tests, `PYTEST_ARGS=tests/engine` runs a part.
PYTEST_ARGS ?= -m "not slow"
# DeepSpeed to install in place of the one in constraints.txt; `make test-oldest` sets it.
DEEPSPEED ?=
OLDEST_DEEPSPEED := 0.16.9

BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# DeepSpeed compiles its communication op on first use and looks for ninja on the path.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help demo test test-oldest pytest lint typecheck format clean check-compiler
.DEFAULT_GOAL := help

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(if $(GPU),,check-compiler) $(VENV)/run.stamp  ## fine-tune the embedded default model (COMPARE=1: also without freezing)
	bash launch/demo.sh $(if $(COMPARE),--compare) $(DEMO_ARGS)

test: check-compiler lint typecheck pytest  ## install, then lint, type check and run the tests

# What the oldest DeepSpeed does differently by itself: it wraps stage 0 in mixed precision in other classes, has no
# staging buffers under offload, and with scattered gradients does not train as torch does, frozen or not.
OLDEST_TESTS = $(addprefix tests/engine/test_,parity.py frozen.py deepspeed_functions.py memory.py fused_step.py)
OLDEST_EXCEPT = zero0 or scattered or (gradient_buffers and offload)

test-oldest:  ## run the stage engine's tests against the oldest DeepSpeed that is supported, in .venv-oldest
	$(MAKE) VENV=.venv-oldest DEEPSPEED=$(OLDEST_DEEPSPEED) \
	  PYTEST_ARGS='$(OLDEST_TESTS) -m "not slow" -k "not ($(OLDEST_EXCEPT))"' pytest

pytest: check-compiler $(VENV)/dev.stamp  ## run the tests alone
	pytest $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp  ## check style, formatting and the floors of the architecture
	ruff check
	ruff format --check
	lint-imports

typecheck: $(VENV)/dev.stamp  ## check types
	pyrefly check

format: $(VENV)/dev.stamp  ## rewrite what the linter and formatter can
	ruff check --fix
	ruff format

clean:  ## remove the virtual environment, caches and builds
	rm -rf $(VENV) .venv-oldest build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage

# DeepSpeed compiles C++ against Python's headers: its communication op on CPU ranks, its optimizer for offload.
check-compiler:
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "No C++ compiler found ($${CXX:-c++}): install one (Debian: apt-get install g++) or set CXX" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	  echo "No Python.h for $(PYTHON): install Python's headers (Debian: apt-get install python3-dev)" >&2; exit 1; }

# torch comes first and by itself, because PyPI's build for Linux carries several GB of CUDA libraries:
# - with an NVIDIA GPU that build is the right one;
# - without, the CPU build is taken from PyTorch's own index if that answers within five seconds;
# - else plain pip decides (a mirror or a folder of wheels that pip is set up with, or the CUDA build, which
#   works on a CPU too).
# --no-deps keeps this step to the one wheel; the next one installs what it depends on, as constrained.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@set -e; index=; \
	if [ -z "$(GPU)" ] && $(BIN)/python -c \
	  'import urllib.request as u; u.urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; \
	then index="--index-url $(TORCH_CPU_INDEX)"; fi; \
	torch="$$(grep '^torch==' constraints.txt)"; set -x; \
	$(PIP) install --no-deps $$index "$$torch"
	@touch $@

$(VENV)/constraints.txt: constraints.txt $(VENV)/torch.stamp
	sed 's/^deepspeed==.*/$(if $(DEEPSPEED),deepspeed==$(DEEPSPEED),&)/' constraints.txt > $@

$(VENV)/run.stamp: $(VENV)/constraints.txt pyproject.toml
	$(PIP) install --constraint $(VENV)/constraints.txt --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/constraints.txt pyproject.toml
	$(PIP) install --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/run.stamp
