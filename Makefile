# `make demo` and `make test` do everything, the first time on a machine included.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint
setup: .venv/installed

# Not $(BIN)/pip: it holds its folder's path, and would fill the old folder where this one is a copy.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m data.toy.demo

# In the order of their names: by default files with the fewest tests come last, the slowest among them.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
