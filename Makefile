# Needs only make and Python >= 3.10. Every path is relative, so that the folder's own name may hold
# spaces; stamp files in .venv make a second run cost nothing.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-heavy check lint bench format setup-test clean

PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# A test process for each core, and one thread in each: the models are too small for two, and two
# that share a core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/.demo-installed ## Set up and run the notebooks headless on the embedded models
	.venv/bin/colabtools demo

test: .venv/.test-installed ## Set up and run the test suite
	$(PYTEST)

# The heavy tier carries the marker `heavy`: long runs and runtimes that are large or rarely used;
# what needs a runtime of its own builds its own environment.
test-heavy: .venv/.test-installed ## Run the tests that take long or need large, rarely used runtimes
	$(PYTEST) -m heavy

check: lint test ## Lint, check formatting and types, and run the test suite

lint: .venv/.test-installed ## Lint, check formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: .venv/.test-installed ## Run every benchmark
	@set -e; for question in benchmarks/*.py; do \
	if [ -e "$$question" ]; then echo "$$question"; $(PY) "$$question"; \
	else echo "No benchmark exists yet."; fi; done

format: .venv/.test-installed ## Apply the formatter and the safe fixes (never to notebooks)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# A browser for the tests of the notebook's forms; where none can be had they are skipped by name.
setup-test: .venv/.browser-installed ## Install what the tests need beyond Python: a browser
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -y -qq \
	--no-install-recommends chromium chromium-driver >/dev/null || \
	echo "No browser could be installed; the tests that need one are skipped." >&2; \
	else echo "For the browser tests, as root: apt-get install chromium chromium-driver" >&2; fi

# .cache stays as well: it may hold hours of a training script's state.
clean: ## Remove caches, builds and demo output; .venv stays
	rm -rf .mypy_cache .pytest_cache .ruff_cache build dist demo outputs workspace
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# ensurepip is what Debian splits off into python3.X-venv; without it `python -m venv` leaves half
# an environment.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	found=$$($(PYTHON) -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo missing); \
	echo "colabtools needs Python >= 3.10, and $(PYTHON) is $$found." \
	"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt-get install" \
	"$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# torch first and by itself: the resolver would take the CUDA build, gigabytes without a card's use.
.venv/.torch-installed: scripts/install_torch.py .venv/.created
	$(PY) scripts/install_torch.py
	@touch $@

.venv/.demo-installed: pyproject.toml .venv/.torch-installed
	$(PIP) install --quiet -e ".[dreambooth,notebook]"
	@touch $@

.venv/.test-installed: pyproject.toml .venv/.torch-installed
	$(PIP) install --quiet -e ".[dev]"
	@touch .venv/.demo-installed $@

.venv/.browser-installed: pyproject.toml .venv/.test-installed
	$(PIP) install --quiet -e ".[dev,browser]"
	@touch $@
