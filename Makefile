# Everything runs in .venv, which is made on first use and brought up to date when setup.py or pyproject.toml change.
#   make test PYTEST_ARGS="tests/test_losses.py -x"     (by default all tests, in two processes)
#   make test PYTHON=python3.13         (after removing .venv, if that was made by another Python)

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo demo-stream test test-container lint format clean
.DELETE_ON_ERROR:

help:  ## Show these lines.
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/demo.stamp  ## Train on a year of flights, find corrupted rows, with a Beam pipeline.
	$(BIN)/beam-vae demo

demo-stream: $(VENV)/demo.stamp  ## Score flights from a Pub/Sub topic on this machine, and swap the model meanwhile.
	$(BIN)/beam-vae demo-stream

test: lint  ## Check the code and run the tests.
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-container: $(VENV)/dev.stamp  ## Build the image and score with it: minutes; root, buildah and debootstrap.
	CONTAINER_TEST=1 $(BIN)/python -m pytest -s -rs tests/test_container.py

lint: $(VENV)/dev.stamp  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp  ## Rewrite the code in its style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and build outputs, and have the next run install again.
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(VENV)/*.stamp
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are in .venv, so that they go with it.
$(VENV)/created.stamp:
	test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.stamp: setup.py pyproject.toml | $(VENV)/created.stamp
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: setup.py pyproject.toml | $(VENV)/created.stamp
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	touch $@ $(VENV)/demo.stamp
