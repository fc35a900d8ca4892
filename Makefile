PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart quickstart-short test lint clean

# torch first and alone: any other resolution order could choose a CUDA build of several GB.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit('peft_spon needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ...' % v)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,eval,quant,dev]"
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(ARGS)

quickstart-short: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py --short

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
