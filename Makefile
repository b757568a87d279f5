# `make quickstart` and `make test` make .venv by themselves; `make help` lists everything.
# Written for GNU make 3.81 (macOS) and later.

PYTHON ?=
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
PROVE_ARGS ?=
MINUTES ?=

# Tests start many processes; without compiled files each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin

# One torch thread a worker: the workers are the parallelism, and results do not depend on cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: help quickstart test test-avx2 ranks prove prove-tasks prove-feedback kills browser clients feedback ready-browser ready-clients ready-feedback ready-interop interop lint style types layers docs code-size format ci clean force
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart [MINUTES=5]  the whole line on this machine: text in, a trained model out'
	@echo 'make test                    the tests (PYTEST_ARGS="-k shards" chooses some)'
	@echo 'make test-avx2               tests of packing, dtype and training, with wide instructions hidden'
	@echo 'make ranks                   every layout of processes against one process (gloo, 2 to 8 processes)'
	@echo 'make prove                   what every alignment algorithm reaches where the optimum is known'
	@echo 'make kills                   runs killed at random moments go on as if they never were'
	@echo 'make prove-tasks             even tokens, addition, sentiment: base models aligned by commands'
	@echo 'make prove-feedback          200 noisy judgements through the site, then DPO and PPO against their parent'
	@echo 'make browser                 the chat page in a headless Chromium (fetched from npm where there is none)'
	@echo 'make clients                 the server with the packages that people call it with, from PyPI'
	@echo 'make feedback                the feedback application with browsers, PostgreSQL and several processes'
	@echo 'make interop                 weights, data and scores compared with transformers, TRL, lm-eval, datatrove and S3'
	@echo 'make lint                    style (ruff), types (pyright) and layers (import-linter)'
	@echo 'make format                  let ruff rewrite what it can'
	@echo 'make docs                    run the code blocks of README.md and docs/'
	@echo 'make code-size                   sizes of the code: lines of logic, functions, files, comments'
	@echo 'make ci                      all of it, as the build server does'
	@echo 'make clean                   remove .venv, .venv-clients and caches; runs/ and data/ stay'
	@echo
	@echo 'PYTHON=python3.12            the interpreter that makes .venv (found by itself otherwise)'
	@echo 'PIP_ARGS="..."               more options for pip install, e.g. for another PyTorch build'
	@echo 'CONSTRAINTS=                 do not pin the versions of constraints.txt'

quickstart: $(VENV)/.core
	$(BIN)/openpalm quickstart $(if $(MINUTES),--minutes $(MINUTES))

test: $(VENV)/.dev
	$(PYTEST) $(PYTEST_ARGS)

# What depends on the processor, on one without bfloat16 and 8-bit dot products.
test-avx2: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) tests/generate tests/train \
	  tests/align/rollouts/test_rollout.py tests/cli/test_quickstart.py tests/cli/test_sample.py tests/base/test_device.py $(PYTEST_ARGS)

# Not by `make test`: each test starts several processes, which would fight for the cores.
ranks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ranks $(PYTEST_ARGS)

prove: $(VENV)/.dev
	$(BIN)/python proofs/prove.py $(PROVE_ARGS)

kills: $(VENV)/.dev
	for verb in train sft dpo reward grpo ppo; do $(BIN)/python benchmarks/kill.py --verb $$verb --kills 10 || exit 1; done

prove-tasks: $(VENV)/.proofs
	$(BIN)/python proofs/even.py $(PROVE_ARGS)
	$(BIN)/python proofs/addition.py $(PROVE_ARGS)
	$(BIN)/python proofs/sentiment.py $(PROVE_ARGS)

prove-feedback: $(VENV)/.dev
	$(BIN)/python proofs/feedback_loop.py $(PROVE_ARGS)

ready-browser: $(VENV)/.browser

ready-clients: $(VENV)-clients/.ready

browser: ready-browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser $(PYTEST_ARGS)

clients: ready-clients
	OMP_NUM_THREADS=1 $(VENV)-clients/bin/python -m pytest tests/clients $(PYTEST_ARGS)

ready-feedback: $(VENV)/.feedback

# Not by `make test`: it starts browsers, a PostgreSQL server and many processes, and kills some.
feedback: ready-feedback
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/feedback_system tests/feedback/packages $(PYTEST_ARGS)

ready-interop: $(VENV)-interop/.ready

interop: ready-interop
	OMP_NUM_THREADS=1 $(VENV)-interop/bin/python -m pytest tests/interop $(PYTEST_ARGS)

lint: style types layers

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

layers: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.dev
	$(BIN)/python tests/docs_blocks.py

code-size: $(VENV)/.dev
	$(BIN)/python tests/code_size.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci:
	.ci/run

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-interop node_modules build dist htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- .venv -------------------------------------------------------------------------------------

# An editable install remembers where the folder was: install again when it moved.
ifneq ($(CURDIR),$(shell cat $(VENV)/.folder 2>/dev/null))
MOVED := force
endif

$(VENV)/.core: EXTRA := [serve,feedback]
$(VENV)/.dev: EXTRA := [dev]
$(VENV)/.core $(VENV)/.dev: pyproject.toml constraints.txt $(BIN)/python $(MOVED)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || { echo 'make: .venv has no pip; remove it (rm -rf .venv) and repeat' >&2; exit 1; }
	@echo 'installing OpenPaLM and what it needs into .venv (PyTorch is large: some minutes, once)'
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.$(EXTRA)' \
	  || { echo 'make: pip could not install OpenPaLM; its lines above say why' >&2; exit 1; }
	@echo '$(CURDIR)' > $(VENV)/.folder
	@touch $(VENV)/.core $@

$(VENV)/.proofs: $(VENV)/.dev
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,proofs]'
	@touch $@

# A Chromium and axe-core come from npm, npm from PyPI.
$(VENV)/.browser: $(VENV)/.dev tests/browser/fetch
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,browser]'
	@tests/browser/fetch
	@touch $@

# irrCAC asks for old versions of scipy and coverage but works with those of constraints.txt.
$(VENV)/.feedback: $(VENV)/.browser
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[feedback-tests]'
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) --no-deps \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) irrCAC
	@touch $@

# Apart from .venv: these packages bring a hundred others.
$(VENV)-clients/.ready: pyproject.toml constraints.txt $(BIN)/python $(MOVED)
	@echo 'installing the clients into $(VENV)-clients (some minutes, once)'
	@$(BIN)/python -m venv --clear $(VENV)-clients
	@$(VENV)-clients/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[clients]'
	@touch $@

$(VENV)-interop/.ready: pyproject.toml constraints.txt $(BIN)/python $(MOVED)
	@echo 'installing the libraries of others into $(VENV)-interop (some minutes, once)'
	@$(BIN)/python -m venv --clear $(VENV)-interop
	@$(VENV)-interop/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
	    $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[interop]'
	@touch $@

$(BIN)/python:
	@recent=; made=; \
	for python in $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  recent=$$python; \
	  "$$python" -c 'import venv, ensurepip' 2>/dev/null || continue; \
	  made=$$python; break; \
	done; \
	if [ -z "$$recent" ]; then \
	  echo 'make: no Python >= 3.11 found as $(if $(PYTHON),$(PYTHON),python3.13, python3.12, python3.11 or python3); install one, or name it: make PYTHON=/path/to/python3.12 ...' >&2; exit 1; \
	elif [ -z "$$made" ]; then \
	  echo "make: $$recent cannot make .venv; install python3-venv (Debian, Ubuntu: sudo apt install python3-venv)" >&2; exit 1; \
	fi; \
	echo "making .venv with $$made"; \
	"$$made" -m venv --clear $(VENV) \
	  || { rm -rf $(VENV); echo "make: $$made could not make .venv, its lines above say why" >&2; exit 1; }

force:
