# Everything from a fresh clone: Python >= 3.11 and make are all that must be there. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# torch: cpu, cuda (what PyPI has), or auto: cpu where Linux shows no NVIDIA driver
TORCH ?= auto
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# One thread: on a small or busy machine several OpenMP threads are many times slower than one for models of this size.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help install install-locked install-extras quickstart test test-all test-extras test-lowest notebooks docs coverage golden parity gpu lint format lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the package with its development tools, at the versions of constraints.txt

# The stamp is touched last, so an interrupted install starts again and a finished one is reused.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is missing, older than Python 3.11 or without its venv module;" \
	    "install one (Debian and Ubuntu: apt install python3-venv) or name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ "$(TORCH)" = cpu ] || { [ "$(TORCH)" = auto ] && [ "$$(uname -s)" = Linux ] && \
	    ! command -v nvidia-smi >/dev/null && [ ! -e /dev/nvidiactl ]; }; then \
	  echo "installing torch's CPU build (the environment takes about 2 GB); make TORCH=cuda install takes the CUDA build"; \
	  $(PY) -m pip install --quiet --retries 1 --timeout 20 --index-url $(TORCH_CPU_INDEX) \
	    $$(grep -E '^(torch|torchvision)==' constraints.txt) 2>/dev/null || \
	    echo "$(TORCH_CPU_INDEX) cannot be reached or lacks this version: taking PyPI's build"; \
	fi
	@$(PY) -c 'import torch' 2>/dev/null || \
	  echo "installing into $(VENV): 3 GB to download and 6.5 GB on disk on Linux, about 3 minutes on a fast line"
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)  ## train, blend and score the embedded miniature; no download, no GPU
	$(PY) -m dblightning quickstart
	@echo "For the README's further commands: source $(VENV)/bin/activate"

test: $(STAMP)  ## the everyday tests
	$(PY) -m pytest

test-all: $(STAMP)  ## every test that needs neither published weights nor the reference environment, slow ones too
	$(PY) -m pytest -m "not weights and not parity"

# Gradio wants an older Pillow than the core is tested with
install-extras: $(STAMP)  ## add the extras studio, serve, search and trackio to .venv, and their tests' clients
	grep -v '^pillow==' constraints.txt > $(VENV)/constraints-extras.txt
	$(PY) -m pip install --quiet -c $(VENV)/constraints-extras.txt -e '.[dev,test-extras]'

test-extras: install-extras  ## the tests of studio, service, search, loggers and docs site; in a real Chromium where there is one
	$(PY) -m pytest tests/studio tests/serving tests/preference_search tests/test_loggers.py tests/test_site.py

# The extras that `make test` needs, without its tools. UV_TORCH_BACKEND=cpu takes torch's CPU build.
LOWEST := .venv-lowest
UV_PIP := $(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python
test-lowest:  ## a few tests at the lowest versions pyproject.toml allows, in an environment of their own (5 GB)
	@test -x $(LOWEST)/bin/uv || { $(PYTHON) -m venv $(LOWEST) && $(LOWEST)/bin/pip install --quiet uv; }
	$(UV_PIP) --resolution lowest-direct -r pyproject.toml --extra report --extra clip --extra remote
	$(UV_PIP) --no-deps -e . && $(UV_PIP) pytest pytest-timeout
	mkdir -p runs/lowest && cd runs/lowest && $(CURDIR)/$(LOWEST)/bin/python -m dblightning quickstart --check
	$(LOWEST)/bin/python -m pytest tests/test_package.py tests/test_extras.py tests/test_signatures.py tests/test_pipeline.py \
	  tests/miniature/test_pipeline.py tests/miniature/test_flow_pipeline.py tests/test_flow_training.py -k "not optimum"

notebooks: $(STAMP)  ## execute the notebooks in place, with what the extra notebooks adds to .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,notebooks]'
	$(PY) notebooks/execute.py

docs: $(STAMP)  ## add the extra docs to .venv and build the pages of docs/ with the API reference into site/
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "See site/index.html; with live reload: $(PY) -m mkdocs serve"

coverage: $(STAMP)  ## the everyday tests with the share of lines and branches they run
	$(PY) -m pytest --cov --cov-report=term

golden: $(STAMP)  ## record anew what tests/golden holds the package to; only where results are meant to change
	$(PY) -m tests.golden.record

parity: $(STAMP)  ## compare ImageReward with the image-reward package, in an environment of its own (6 GB)
	test -x .venv-image-reward/bin/python || $(PYTHON) -m venv .venv-image-reward
	.venv-image-reward/bin/pip install --quiet -r tests/rewards/image_reward_reference.txt
	mkdir -p runs
	.venv-image-reward/bin/python tests/rewards/make_image_reward_fixture.py runs/parity.npz --seed $$(date +%s)
	DBLIGHTNING_PARITY_FIXTURE=$(CURDIR)/runs/parity.npz $(PY) -m pytest -m parity tests/rewards

gpu: $(STAMP)  ## measure what needs a GPU, in 25 minutes, into benchmarks/results/gpu_<name>.json and a page
	$(PY) benchmarks/gpu.py

lint: $(STAMP)  ## style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)  ## rewrite the sources to the project's formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: $(STAMP)  ## write the versions installed in .venv to constraints.txt, and their files' hashes to requirements.lock
	@{ grep '^#' constraints.txt; $(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt && touch $(STAMP)
	@test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --quiet uv; }
	.venv-lock/bin/uv --quiet pip compile --universal --generate-hashes --no-annotate --no-header --python-version 3.11 \
	  --constraint constraints.txt --extra dev pyproject.toml --output-file requirements.lock

install-locked:  ## like install, from requirements.lock: every downloaded file is checked against its SHA-256
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

clean:  ## remove caches and build output; .venv stays (rm -r .venv to start afresh)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
