# make setup       .venv with everything, from the pinned versions in constraints.txt (CPU)
# make quickstart  set-up, then the main job: SFT and DPO of an embedded tiny Gemma 3, with accuracies before and after
# make test        set-up, then the tests
# make lint        ruff and mypy
PYTHON ?= python3
EXTRAS ?= dev
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test lint

setup: $(VENV)/.done

# uv installs in a third of pip's time; where it can't be had, pip does the same from the same constraints
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "rlhf needs Python 3.11 or later: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv \
		&& $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[$(EXTRAS)]' \
		|| $(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

quickstart: setup
	$(BIN)/rlhf pipeline=quickstart

test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
