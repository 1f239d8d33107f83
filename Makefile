# Every target that runs Python depends on the environment, so each works on a fresh machine by itself.
.DEFAULT_GOAL := help
PYTHON ?= python3
# An active environment of conda or venv is used if it has every pinned package, and tbac from this folder.
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
HAS_ALL := $(if $(ACTIVE),$(shell $(ACTIVE)/bin/python -I -c "import importlib.metadata as m, importlib.util as u; \
  assert all(m.version(l.split('==')[0]).startswith(l.strip().split('==')[1]) for l in open('requirements.txt') if '==' in l); \
  assert u.find_spec('tbac').origin.startswith('$(CURDIR)/'); print('yes')" 2>/dev/null))
BIN := $(if $(HAS_ALL),$(ACTIVE)/bin,.venv/bin)
MACHINE ?= local
ARGS ?=
SWEEP ?= taps_x_lr
PORT ?= 5000
STORE = $(or $(MLFLOW_TRACKING_URI),sqlite:///outputs/mlflow.db)
READY := $(if $(HAS_ALL),requirements.txt,.venv/.ready)
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup
TRAIN = $(BIN)/python experiments/train.py
export PYTHONUNBUFFERED := 1

.PHONY: help env demo words test test-slow slurm-packages stage1 stage2 stage3 stages sweep bench bench-gpu bench-gpu-pack shards-verify lint app ui

help: ## print this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY) ## make .venv and install the pinned dependencies, unless an active environment has them all

.venv/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(READY) ## the main job on the shapes world: build, train three stages, score, generate, answer (8 min on two cores)
	$(BIN)/python experiments/demo.py $(ARGS)

words: $(READY) ## the world of words: installs its language model, converts it, and builds the world around it
	$(BIN)/python data_prep/words/build.py install=true $(ARGS)

test: $(READY) ## the test suite, on all cores up to eight (10 min on two)
	$(PYTEST) $(ARGS)

test-slow: $(READY) slurm-packages ## the test suite with the tests that take minutes or several processes
	$(PYTEST) $(ARGS) || [ $$? -eq 5 ]  # 5: none of those that ARGS selects
	$(BIN)/python -m pytest -m "(slow or slurm or browser) and not gpu" $(ARGS) || [ $$? -eq 5 ]

# Debian's packages for a SLURM cluster and a browser on this machine; without them, and without root, those tests are skipped
slurm-packages:
	@command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v chromedriver >/dev/null || { command -v apt-get >/dev/null && \
	  $(if $(filter 0,$(shell id -u)),,sudo -n) sh -c 'apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge chromium chromium-driver'; } || \
	  echo "slurm-wlm, munge and chromium aren't installed and can't be: their tests will be skipped"

stage1: $(READY) ## text-to-image pre-training; MACHINE=..., ARGS="world=shapes ..." pass through
	$(TRAIN) stage=t2i_pretrain machine=$(MACHINE) $(ARGS)

stage2: $(READY) ## image-text-to-image pre-training, from the newest stage1 checkpoint or INIT=...
	$(TRAIN) stage=ti2i_pretrain machine=$(MACHINE) $(if $(INIT),init='$(subst ','\'',$(INIT))') $(ARGS)

stage3: $(READY) ## fine-tuning on curated data, from the newest stage2 checkpoint or INIT=...
	$(TRAIN) stage=finetune machine=$(MACHINE) $(if $(INIT),init='$(subst ','\'',$(INIT))') $(ARGS)

stages: $(READY) ## all three stages in one process
	$(TRAIN) 'stages=[t2i_pretrain,ti2i_pretrain,finetune]' machine=$(MACHINE) $(ARGS)

sweep: $(READY) ## a committed multirun of conf/sweep/, then its report; SWEEP=taps_x_lr; goes on where it stopped
	$(BIN)/python experiments/sweep.py name=$(SWEEP) $(ARGS)

bench: $(READY) ## speed and memory against the release's way, on the CPU, as ratios
	$(BIN)/python experiments/bench.py $(ARGS)

bench-gpu: $(READY) ## the same at real sizes with random weights on a GPU, with the largest batches that fit
	$(BIN)/python experiments/bench.py experiment=bench_gpu $(ARGS)

bench-gpu-pack: $(READY) ## what bench-gpu needs where there is no network: build/bench-gpu/, at most 60 MiB
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/bench-gpu/wheels -r experiments/speed/offline.txt
	for version in 3.11 3.12; do $(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $$version \
	  --dest build/bench-gpu/wheels $$(grep '^pillow' experiments/speed/offline.txt); done
	cp experiments/speed/run_offline.sh build/bench-gpu/run.sh

shards-verify: $(READY) ## look at every sample of a folder of shards; DIR=data/blip3o_60k
	$(BIN)/python data_prep/verify.py $(if $(DIR),path='$(subst ','\'',$(DIR))') $(ARGS)

app: $(READY) ## draw, edit, ask and look into the ladder in a browser, at http://127.0.0.1:7860; the demo's model
	$(BIN)/python experiments/app.py $(ARGS)

ui: $(READY) ## MLflow's pages: prints the links that list runs and compare the newest sweep; PORT=5000 for another port
	@$(BIN)/python -c 'import sys; from tbac.training.tracking import list_links; print(*(f"{name}: {link}" for name, link in list_links(*sys.argv[1:]).items()), sep="\n", flush=True)' "$(STORE)" http://127.0.0.1:$(PORT)
	$(BIN)/mlflow ui --backend-store-uri "$(STORE)" --host 127.0.0.1 --port $(PORT)

lint: $(READY) ## ruff, mypy, import direction, what can be counted of how the code reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_house.py tests/test_reading.py
