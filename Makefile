PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test gpu check fmt clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-7s %s\n", $$1, $$2}'

.venv/ready: pyproject.toml constraints.txt scripts/setup
	@PYTHON=$(PYTHON) sh scripts/setup

demo: .venv/ready ## stylize the built-in moving picture with the embedded model, no camera or network needed
	$(BIN)/livestyle demo

test: .venv/ready ## run the tests
	$(BIN)/python -m pytest

gpu: ## with an NVIDIA GPU and no network: its tests and all benchmarks, into bench/results; again goes on
	@sh scripts/gpu

check: .venv/ready ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: .venv/ready ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
