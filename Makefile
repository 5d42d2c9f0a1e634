# make demo       align a small language model on real data, end to end (first call installs)
# make test       the test suite without the drills      make test-slow   the drills (kills, resumes, large runs)
# make throughput one training step, side by side with TRL's
# make lint       ruff, security rules included          make lock        re-pin requirements/*.lock from .venv
# make audit      known vulnerabilities of the pinned packages (asks the package index, says so where it cannot)
# make clean      remove .venv and caches; results in outputs/ stay
#
# Everything lives in .venv and is installed from pins, with --no-deps: see requirements/lock.py.

# Python 3.11 or 3.12.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The torch build. pip's default is taken; for another (CPU only, another CUDA version) give pip's options as well, as
# pytorch.org lists them:  make demo TORCH="torch==2.13.0 --index-url …"   (`make clean` first if one is installed).
TORCH ?= torch==2.13.0
# Passed on to the demo:  make demo ARGS="train.epochs=1"
ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TEST := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest

.PHONY: demo test test-slow throughput lint lock audit clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: .venv/.demo-stamp
	$(BIN)/python -m jobs.demo jobs/configs/demo.yaml $(ARGS)

# pytest's exit code 5 says that no test matched, which is no failure. Tests with Ray share one cluster: one process.
test: .venv/.demo-stamp .venv/.dev-stamp
	$(TEST) -m "not slow and not ray" -n 2 --dist loadfile $(ARGS) || [ $$? -eq 5 ]
	$(TEST) -m "not slow and ray" $(ARGS) || [ $$? -eq 5 ]

throughput: .venv/.demo-stamp .venv/.throughput-stamp
	$(BIN)/python -m benchmarks.throughput $(ARGS)

test-slow: .venv/.demo-stamp .venv/.dev-stamp
	$(TEST) -m slow $(ARGS) || [ $$? -eq 5 ]

lint: .venv/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: .venv/.demo-stamp .venv/.dev-stamp
	$(BIN)/python requirements/lock.py

# pip-audit has a place of its own: its dependencies are none of ours.
audit: .venv/.torch-stamp
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install --quiet pip-audit; }
	$(BIN)/python requirements/audit.py .venv/audit/bin

clean:
	rm -rf .venv *.egg-info build .pytest_cache .ruff_cache .hypothesis

# A stamp is written last, so that an interrupted installation is taken up again by the next call.
.venv/.torch-stamp:
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit("qalign needs Python 3.11 or 3.12; name one: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	@echo "installing $(TORCH) (the largest download) …"
	$(INSTALL) $(TORCH)
	@touch $@

# deepspeed has no wheel: it is built here, against the torch that is already installed.
.venv/.base-stamp: .venv/.torch-stamp requirements/base.lock pyproject.toml
	@echo "installing requirements/base.lock (a few minutes the first time) …"
	$(INSTALL) --no-deps --no-build-isolation -r requirements/base.lock
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.demo-stamp .venv/.dev-stamp .venv/.throughput-stamp .venv/.optuna-stamp .venv/.coherence-stamp: .venv/.%-stamp: requirements/%.lock .venv/.base-stamp
	$(INSTALL) --no-deps -r $<
	@touch $@
