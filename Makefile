# Every target sets up all it needs: Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test quality peers clean

demo: $(VENV)/.cli
	@mkdir -p demo
	$(BIN)/eplb-jax plan example --sum --replicas 288 --groups 8 --nodes 4 --gpus 32 --policy global \
	  --output demo/plan.json --plot demo/plan.png
	@echo "wrote demo/plan.json and demo/plan.png"

test: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n $(WORKERS) -m "not quality"

# The balance of every strategy beside its torch original, on measured loads: some minutes.
quality: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m quality

# The tests that compare with SGLang, whose plain Python files are installed without its dependencies.
peers: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peers sglang==0.5.23
	$(BIN)/python -m pytest -m peers

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Installed again only when the project file changes; the marks name what was installed.
$(VENV)/.cli: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cli]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.cli

clean:
	rm -rf $(VENV) demo
