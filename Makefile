# Every target makes .venv or uses the one that is there, and installs what it needs and no more.
# PYTHON chooses the interpreter that a new .venv is made with: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test model-cards quality style build
.SECONDARY:

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-quickstart  ## Train, merge, measure and save a small model, on a CPU
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.installed-test  ## Run all tests
	$(BIN)/python -m pytest

model-cards: $(VENV)/.installed-quickstart  ## Write the cards in model_cards/ anew from the JSON beside them
	$(BIN)/python recipes/model_cards.py

quality: $(VENV)/.installed-quality  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-quality  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed-build  ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build

# One stamp for each extra; it is installed anew when one of these files is newer than its stamp.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/.installed-build: | $(BIN)/python
	$(BIN)/python -m pip install "build>=1.2"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
