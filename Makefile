# make demo                     pack, train and evaluate on handwritten digits, in a virtual environment
# make test                     all tests except the longest, which kill and hang processes
# make test-faults              those too, see docs/reliability.md
# make polymnist DATA=folder    the published PolyMNIST experiment
# make polymnist-cpu DATA=folder  the same data on two CPU cores, in an evening
# make cubicc DATA=folder       the published CUBICC experiment, birds with captions
# make lint, make format        the checks of CI; fix most of what they report

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Overrides of the config, e.g. make demo ARGS="seed=1 train.max_steps=500".
ARGS ?=
# Overrides of the config of the refiner.
REFINER_ARGS ?=

.PHONY: demo polymnist polymnist-cpu cubicc test test-faults lint format

# The package is installed again if the stamp files are older than pyproject.toml or constraints.txt. --no-compile:
# compiling everything takes longer than any other step except the download, so modules are compiled when they are
# imported. PYTHONDONTWRITEBYTECODE would make every process compile torch again, which takes four seconds.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt --editable

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): a few minutes, once"
	$(INSTALL) .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	@echo "installing into $(VENV), with what the tests need: a few minutes, once"
	$(INSTALL) '.[dev]'
	touch $(VENV)/installed $@

shards/digits/index.json: | $(VENV)/installed
	$(BIN)/python tools/make_shards.py digits --out shards/digits

# Evaluation needs the classifiers for coherence. They are trained once and kept beside the shards.
shards/digits/classifiers/m0.safetensors: shards/digits/index.json
	$(BIN)/python tools/train_classifiers.py shards/digits

demo: $(VENV)/installed shards/digits/classifiers/m0.safetensors
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/digits.yaml --overwrite $(ARGS)
	$(BIN)/python launch/evaluate.py runs/digits
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/digits_refiner.yaml --overwrite $(REFINER_ARGS)
	$(BIN)/python launch/evaluate.py runs/digits_refiner
	@echo
	@echo "compare runs: $(BIN)/mlflow ui"

# DATA contains the released folder PolyMNIST/, or mnist.npz and polymnist_backgrounds/ with one photograph per
# modality.
POLYMNIST_INPUT = $(if $(wildcard $(DATA)/PolyMNIST/.),--released "$(DATA)/PolyMNIST",--mnist "$(DATA)/mnist.npz" --backgrounds "$(DATA)/polymnist_backgrounds")

shards/polymnist/index.json: | $(VENV)/installed
	@test -n "$(DATA)" || { echo "make polymnist DATA=folder: a folder with PolyMNIST/, or with mnist.npz and polymnist_backgrounds/"; exit 2; }
	$(BIN)/python tools/make_shards.py polymnist $(POLYMNIST_INPUT) --out shards/polymnist

shards/polymnist/classifiers/m0.safetensors: shards/polymnist/index.json
	$(BIN)/python tools/train_classifiers.py shards/polymnist

polymnist: $(VENV)/installed shards/polymnist/classifiers/m0.safetensors
	$(BIN)/accelerate launch launch/train.py configs/polymnist.yaml --resume $(ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist protocol=released
	$(BIN)/accelerate launch launch/train.py configs/polymnist_refiner.yaml --resume $(REFINER_ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist_refiner

polymnist-cpu: $(VENV)/installed shards/polymnist/classifiers/m0.safetensors
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/polymnist_cpu.yaml --resume $(ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist_cpu protocol=released
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/polymnist_cpu_refiner.yaml --resume $(REFINER_ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist_cpu_refiner

# DATA is or contains the released folder CUBICC/, or contains CUB-200-2011 with its captions.
CUBICC_INPUT = $(shell if test -f "$(DATA)/images.pt"; then echo '--released "$(DATA)"'; \
	elif test -f "$(DATA)/CUBICC/images.pt"; then echo '--released "$(DATA)/CUBICC"'; else echo '--cub "$(DATA)"'; fi)

cubicc: $(VENV)/installed
	@test -n "$(DATA)" || { echo "make cubicc DATA=folder: the released CUBICC folder, or one with CUB_200_2011/ and text/"; exit 2; }
	test -f shards/cubicc/index.json || $(BIN)/python tools/make_shards.py cubicc $(CUBICC_INPUT) --out shards/cubicc
	$(BIN)/accelerate launch launch/train.py configs/cubicc.yaml --resume $(ARGS)
	$(BIN)/python launch/evaluate.py runs/cubicc

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 15

# All tests of these folders, also the long ones: kills and hangs, and 5,000 tables and folders of all sorts.
test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m 'faults or not faults' tests/faults tests/training tests/distributed \
		tests/datasets/test_any_data.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
