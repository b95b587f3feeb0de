# Everything a newcomer runs. Nothing but Python is needed: each target sets up what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup setup-federated demo federated-demo test test-arm64 test-deploy check bench proto wheel locks clean

setup: $(VENV)/serve.done

setup-federated: $(VENV)/train.done

demo: setup
	$(BIN)/trifold demo models/trifold-nano $(ARGS)

federated-demo: $(VENV)/train.done
	rm -rf build/federated-demo
	$(BIN)/trifold federated-demo models/trifold-nano $(ARGS)

# With a worker for each processor: most tests wait for processes that they have started.
test: $(VENV)/dev.done
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# Tiers for arm64, emulated; the qemu and the Python for it are brought into build/arm64 from Debian.
test-arm64: $(VENV)/dev.done
	$(BIN)/python -m tests.arm64 $(ARGS)

# docs/deploy.md from its first word to its last, with real installs from the package index; tells how long it took.
test-deploy: $(VENV)/dev.done
	TRIFOLD_TEST_INSTALL=1 $(BIN)/pytest tests/e2e/test_deploy_page.py -s $(ARGS)

check: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python proto/generate.py --check

bench: $(VENV)/dev.done
	$(BIN)/python -m tests.bench $(ARGS)

proto: $(VENV)/dev.done
	$(BIN)/python proto/generate.py

# One wheel for every platform, in dist/.
wheel:
	rm -f dist/trifold-*.whl
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# What deploy/locks holds, from pyproject.toml and constraints.txt: for x86-64 and arm64, Python 3.11 to 3.13.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command 'make locks' --constraint constraints.txt
locks: $(VENV)/dev.done
	$(COMPILE) --upgrade --extra edge --output-file deploy/locks/edge.txt pyproject.toml
	$(COMPILE) --upgrade --extra device --output-file deploy/locks/device.txt pyproject.toml
	$(COMPILE) --upgrade --extra device --extra gateway --output-file deploy/locks/gateway.txt pyproject.toml
	$(COMPILE) --upgrade --extra cloud --output-file deploy/locks/cloud.txt pyproject.toml
	echo uv | $(COMPILE) --upgrade --output-file deploy/locks/uv.txt -

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
