# `make` shows what there is. Everything runs in an environment of its own, .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LORAS := examples/svi_tiny/loras
OLDEST_DIFFUSERS := $(shell sed -n 's/.*"diffusers>=\([0-9.]*\),.*/\1/p' setup.py).0

# Where this is set, every process compiles the thousands of files that it imports anew: ten seconds each.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo app drift test compat fuzz mutants screenshots quality style clean

help:  ## Show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 16

demo: $(VENV)/demo  ## Make long films with the embedded model: outputs/demo/film.mp4 and comparison.png
	$(BIN)/python examples/demo.py --output_dir outputs/demo

app: $(VENV)/app  ## Show the page, on which films are made, with the embedded model: films in outputs/films
	$(BIN)/diffusers-svi app --folder outputs/films --preset shot --model examples/svi_tiny/model \
		--lora $(LORAS)/shot.safetensors --height 64 --width 64 --num_frames 17 --num_inference_steps 10 \
		--guidance_scale 1 --fps 8 --max_sequence_length 64 --open

drift: $(VENV)/test  ## Measure how chains drift, with error recycling and without: outputs/drift
	$(BIN)/python benchmarks/drift.py --quick --output_dir outputs/drift \
		--lora control-shot=$(LORAS)/control.safetensors erft-shot=$(LORAS)/shot.safetensors

test: $(VENV)/test  ## Run the tests
	$(BIN)/python -m pytest -n logical --dist worksteal

compat: $(VENV)/test  ## Run the parent contract on the oldest diffusers that is allowed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/compat "diffusers==$(OLDEST_DIFFUSERS)"
	PYTHONPATH=build/compat:src $(BIN)/python -m pytest tests/test_parent_contract.py

fuzz: $(VENV)/test  ## Give 5,000 odd inputs of every kind (half an hour)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests/test_fuzz.py

mutants: $(VENV)/test  ## Break the product one line at a time and see whether a test notices (an hour)
	PYTHONPATH=benchmarks $(BIN)/python tests/mutants.py --output_file outputs/mutants.json

screenshots: $(VENV)/test  ## Take the pictures of the page that are in the docs; needs chromium
	PYTHONPATH=tests $(BIN)/python tests/screenshots.py --docs

quality: $(VENV)/test  ## Check style, format, types and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/test  ## Mend style and format where that can be done by a program
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and everything made here
	rm -rf $(VENV) outputs build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# One environment; a file in it for each set of extras that is installed.
# torch comes first and by its exact version, so that nothing else brings another build of it.
$(VENV)/%: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[$*]"
	touch $@
