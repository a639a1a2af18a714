# Everything runs inside .venv; every target can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test lint bench world docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: the constraint picks a wheel of reasonable size
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch into $(VENV) (once, under a minute)"
	$(INSTALL) torch
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.torch
	@echo "installing lit_rlhf into $(VENV) (once, about a minute)"
	$(INSTALL) -e ".[studies]"
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	@echo "installing lit_rlhf with the test extras into $(VENV) (once, about a minute)"
	$(INSTALL) -e ".[studies,test,peers,judge]"
	@touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	$(INSTALL) -e ".[docs]"
	@touch $@

quickstart: $(VENV)/.run
	$(BIN)/python -m studies.quickstart

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/dpo.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/experts.py

world: $(VENV)/.run
	$(BIN)/snakemake --snakefile studies/world.smk --cores 2 --quiet

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs build dist *.egg-info
