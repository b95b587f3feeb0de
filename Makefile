# Everything a newcomer runs. Nothing but Python is needed: each target sets up what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup setup-federated demo federated-demo test check bench proto clean

setup: $(VENV)/serve.done

setup-federated: $(VENV)/train.done

demo: setup
	$(BIN)/trifold demo models/trifold-nano $(ARGS)

federated-demo: $(VENV)/train.done
	rm -rf build/federated-demo
	$(BIN)/trifold federated-demo models/trifold-nano $(ARGS)

test: $(VENV)/dev.done
	$(BIN)/pytest $(ARGS)

check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check

bench: $(VENV)/dev.done
	$(BIN)/python -m tests.bench $(ARGS)

proto: $(VENV)/dev.done
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) build dist

# What serving needs: no torch.
$(VENV)/serve.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[cloud,edge,device,gateway]'
	touch $@

# What sites and the training process need besides: torch, transformers, peft and Flower.
# torch is asked for by its exact version, so that a machine that has a CPU build at hand takes that one.
$(VENV)/train.done: $(VENV)/serve.done
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[cloud,gateway,federated]'
	touch $@

$(VENV)/dev.done: $(VENV)/train.done
	$(PIP) --editable '.[cloud,gateway,telemetry,federated]' --group dev
	touch $@
