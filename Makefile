# Fresh machine: Python 3.11, pip, git, make. Each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test lint soak clean

demo: $(VENV)/.demo
	$(RUN)/convllava demo --output runs/demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

soak: $(VENV)/.dev
	$(RUN)/python tests/soak.py --minutes $(or $(MINUTES),5)

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[synthetic]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
