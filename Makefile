# make demo       the main job on embedded real data, in a virtual environment of its own
# make test       all tests but the longest: kills, hangs and cuts, see docs/reliability.md
# make test-faults    those
# make polymnist DATA=folder    the published PolyMNIST experiment
# make cubicc DATA=folder       the published CUBICC experiment, birds with captions
# make lint, make format        what CI checks; what mends most of it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What a config leaves to the command line, e.g. make demo ARGS="seed=1 train.max_steps=500".
ARGS ?=
# The same for the refiner.
REFINER_ARGS ?=

.PHONY: demo polymnist cubicc test test-faults lint format

# A stamp is newer than what it was installed from, or it is installed again. Byte code is compiled for what is
# imported, when it is: for all that is installed it takes longer than anything else here but the download. Where the
# environment says that it is not to be kept, every process would compile torch again, for four seconds.
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

# What generations are read with; kept with the packed data, and trained once.
shards/digits/classifiers/m0.safetensors: shards/digits/index.json
	$(BIN)/python tools/train_classifiers.py shards/digits

demo: $(VENV)/installed shards/digits/classifiers/m0.safetensors
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/digits.yaml --overwrite $(ARGS)
	$(BIN)/python launch/evaluate.py runs/digits
	$(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml launch/train.py configs/digits_refiner.yaml --overwrite $(REFINER_ARGS)
	$(BIN)/python launch/evaluate.py runs/digits_refiner
	@echo
	@echo "compare runs: $(BIN)/mlflow ui"

# DATA holds the released PolyMNIST/ folder, or mnist.npz and polymnist_backgrounds/ with a photograph a modality.
POLYMNIST_INPUT = $(if $(wildcard $(DATA)/PolyMNIST/.),--released "$(DATA)/PolyMNIST",--mnist "$(DATA)/mnist.npz" --backgrounds "$(DATA)/polymnist_backgrounds")

polymnist: $(VENV)/installed
	@test -n "$(DATA)" || { echo "make polymnist DATA=folder: a folder with PolyMNIST/, or with mnist.npz and polymnist_backgrounds/"; exit 2; }
	test -f shards/polymnist/index.json || $(BIN)/python tools/make_shards.py polymnist $(POLYMNIST_INPUT) --out shards/polymnist
	test -f shards/polymnist/classifiers/m0.safetensors || $(BIN)/python tools/train_classifiers.py shards/polymnist
	$(BIN)/accelerate launch launch/train.py configs/polymnist.yaml --resume $(ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist
	$(BIN)/accelerate launch launch/train.py configs/polymnist_refiner.yaml --resume $(REFINER_ARGS)
	$(BIN)/python launch/evaluate.py runs/polymnist_refiner

# DATA holds the released CUBICC/ folder or is it, or holds CUB-200-2011 with its captions.
CUBICC_INPUT = $(shell if test -f "$(DATA)/images.pt"; then echo '--released "$(DATA)"'; \
	elif test -f "$(DATA)/CUBICC/images.pt"; then echo '--released "$(DATA)/CUBICC"'; else echo '--cub "$(DATA)"'; fi)

cubicc: $(VENV)/installed
	@test -n "$(DATA)" || { echo "make cubicc DATA=folder: the released CUBICC folder, or one with CUB_200_2011/ and text/"; exit 2; }
	test -f shards/cubicc/index.json || $(BIN)/python tools/make_shards.py cubicc $(CUBICC_INPUT) --out shards/cubicc
	$(BIN)/accelerate launch launch/train.py configs/cubicc.yaml --resume $(ARGS)
	$(BIN)/python launch/evaluate.py runs/cubicc

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What kills, hangs and cuts trainings: a part of it, the quick ones, is in `make test`.
test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m 'faults or not faults' tests/faults tests/training tests/distributed

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
