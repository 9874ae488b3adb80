# make setup       .venv with everything, from the pinned versions in constraints.txt (CPU)
# make quickstart  set-up, then the main job: SFT and DPO of an embedded tiny Gemma 3, with accuracies before and after
# make test        set-up, then the tests
# make test-peers  transformers and peft in an environment of their own, and exports compared with what they make of them
# make lint        ruff and mypy
PYTHON ?= python3
EXTRAS ?= dev
TEST_PROCESSES ?= 3
PEERS_PIP ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup quickstart test test-peers lint

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

# neighbours in one process: they compile the same programs
test: setup
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# PEERS_PIP is for pip: where it finds torch's CPU build, for instance
.venv-peers/.done: tests/peers/requirements.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q $(PEERS_PIP) -r tests/peers/requirements.txt
	touch $@

test-peers: setup .venv-peers/.done
	$(BIN)/python -m pytest tests/peers

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
