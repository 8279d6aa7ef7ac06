# Every target makes .venv or uses the one that is there, and installs what it needs and no more.
# PYTHON chooses the interpreter that a new .venv is made with: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process for each core, each with one thread of torch's own: small models are not worth sharing out.
PYTEST := python -m pytest -n logical --maxprocesses 8 --dist worksteal
# The oldest transformers and torch that pyproject.toml allows, and the tests that come near their code.
OLDEST = "$(1)==$(shell sed -n 's/.*"$(1)>=\([0-9.]*\)".*/\1/p' pyproject.toml).*"
OLDEST_BIN := .venv-oldest/bin
OLDEST_TESTS := convert deploy/test_static_shapes.py evaluation/test_captions.py families hub/test_adapter.py \
	hub/test_adapter_refusals.py hub/test_hub.py hub/test_hub_content.py hub/test_hub_faults.py \
	methods models ops/test_attention.py ops/test_forms.py ops/test_matching.py ops/test_merging.py test_scope.py

MEASURED := --random_weights True --device cpu --r 16
SMALL := --model recipes/configs/deit_small $(MEASURED) --rounds 12
PEERS := --peer recipes.peers:sliced
BOTH := $(PEERS) recipes.peers:sliced_layers
EXPORTED := onnxruntime openvino openvino_bfloat16
RUNTIMES := --methods tome --runtimes $(EXPORTED) $(PEERS) --peer_runtimes $(EXPORTED) --batch_sizes 1 16
VIDEO := --model recipes/configs/videomae_base --random_weights True --device cpu --methods tome --r 121 --batch_sizes 1 \
	--rounds 5 --warmup 1 --peer recipes.peers:sliced_video
TINY := --model recipes/configs/deit_tiny $(MEASURED)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-family test-oldest test-optimum model-cards reproduce-sample ecosystem pictures performance docs quality style build
.SECONDARY:

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed-quickstart  ## Train, merge, measure and save a small model, on a CPU
	$(BIN)/python recipes/quickstart.py

test: $(VENV)/.installed-test $(VENV)/.installed-quantised  ## Run all tests
	$(BIN)/$(PYTEST)

test-family: $(VENV)/.installed-test  ## Run what tests one family of models: make test-family F=vit
	$(BIN)/$(PYTEST) tests/families --family "$(F)"

test-oldest: .venv-oldest/.installed  ## Run what touches transformers and torch on the oldest ones, in .venv-oldest
	$(OLDEST_BIN)/$(PYTEST) $(addprefix tests/,$(OLDEST_TESTS))

test-optimum: $(VENV)/.installed-test .venv-optimum/.installed  ## Load exported models in Optimum, which wants an older transformers
	rm -rf build/optimum
	$(BIN)/python -m tests.support.optimum_folders build/optimum
	OPTIMUM_FOLDERS=$(CURDIR)/build/optimum HF_HUB_OFFLINE=1 .venv-optimum/bin/python -m pytest --noconftest -c /dev/null \
		--rootdir . -p no:cacheprovider tests/deploy/optimum_loads.py

model-cards: $(VENV)/.installed-quickstart  ## Write the cards in model_cards/ anew from the JSON beside them
	$(BIN)/python recipes/model_cards.py

# STEPS and LIMIT shorten a trial. A run that was stopped goes on when the same command is given again.
ASSETS ?= ../shared/assets
SAMPLE = --model $(ASSETS)/deit_tiny --train $(ASSETS)/images/train --dev $(ASSETS)/images/dev

reproduce-sample: $(VENV)/.installed-quickstart  ## Train, measure and describe the sample adapter again: make reproduce-sample ASSETS=path/to/assets
	$(BIN)/python recipes/reproduce_sample.py $(SAMPLE) $(if $(STEPS),--steps $(STEPS)) $(if $(LIMIT),--limit $(LIMIT))

ecosystem: $(VENV)/.installed-test  ## Write docs/ecosystem.md anew from the families in tests/families
	$(BIN)/python -m tests.support.ecosystem

performance: $(addprefix $(VENV)/.installed-,evaluate train onnx openvino)  ## Measure speed on a CPU and write the tables in docs/performance anew
	$(BIN)/python recipes/benchmark.py $(SMALL) --methods tome dtem --rounds 20 --batch_sizes 1 16 --breakdown True $(BOTH) --output_dir docs/performance/deit-small
	$(BIN)/python recipes/benchmark.py $(SMALL) --methods tome --runtimes eager compile --batch_sizes 16 --output_dir docs/performance/deit-small-compile
	$(BIN)/python recipes/benchmark.py $(SMALL) --methods tome --runtimes eager compile --dtype bfloat16 --batch_sizes 16 --output_dir docs/performance/deit-small-bfloat16
	$(BIN)/python recipes/benchmark.py $(SMALL) --methods tome --runtimes onnxruntime onnxruntime_one_hot --batch_sizes 8 --output_dir docs/performance/deit-small-onnx
	$(BIN)/python recipes/benchmark.py $(TINY) --methods tome dtem --runtimes eager compile --rounds 60 --batch_sizes 1 $(BOTH) --peer_runtimes eager compile --output_dir docs/performance/deit-tiny
	$(BIN)/python recipes/benchmark.py $(TINY) --methods tome --runtimes eager compile --rounds 10 --batch_sizes 1 4 16 64 256 --output_dir docs/performance/deit-tiny-batches
	$(BIN)/python recipes/benchmark.py $(TINY) $(RUNTIMES) --rounds 15 --output_dir docs/performance/deit-tiny-runtimes
	$(BIN)/python recipes/benchmark.py $(SMALL) $(RUNTIMES) --rounds 10 --output_dir docs/performance/deit-small-runtimes
	$(BIN)/python recipes/benchmark.py $(VIDEO) --output_dir docs/performance/videomae-base
	$(BIN)/python recipes/benchmark_training.py $(TINY) --output_dir docs/performance/training-step
	$(BIN)/python recipes/benchmark.py --task captioning --model recipes/configs/git_base --random_weights True --device cpu \
		--methods tome --r 4 8 12 --batch_sizes 1 4 --rounds 5 --warmup 1 --output_dir docs/performance/git-base
	$(BIN)/python recipes/benchmark.py --task answering --model recipes/configs/llava_half_billion --random_weights True --device cpu \
		--methods tome --r 8 16 --batch_sizes 1 --answer_tokens 10 --rounds 5 --warmup 1 --output_dir docs/performance/llava

# scikit-learn comes with two photographs. MODEL may be a folder, too.
MODEL ?= facebook/deit-tiny-patch16-224
PHOTOS = $(shell $(BIN)/python -c "import sklearn; print(sklearn.__path__[0])")/datasets/images

pictures: $(VENV)/.installed-quickstart  ## Draw the merged tokens of docs/pictures anew: make pictures MODEL=path/to/deit_tiny
	$(BIN)/dtem-hf visualize $(MODEL) $(PHOTOS)/flower.jpg --method tome --r 13 --by-layer --output docs/pictures/layers.png
	$(BIN)/dtem-hf visualize $(MODEL) $(PHOTOS)/flower.jpg $(PHOTOS)/china.jpg --method tome --r 13 --output docs/pictures/tokens.png

docs: $(VENV)/.installed-docs  ## Build the documentation as a site in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quality: $(VENV)/.installed-quality  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-quality  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed-build  ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build

# One stamp for each extra; it is installed anew when one of these files is newer than its stamp.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/.installed-build: | $(BIN)/python
	$(BIN)/python -m pip install "build>=1.2"
	@touch $@

.venv-oldest/.installed: pyproject.toml | $(OLDEST_BIN)/python
	$(OLDEST_BIN)/python -m pip install -e ".[test]" $(call OLDEST,transformers) $(call OLDEST,torch)
	@touch $@

.venv-optimum/.installed: constraints.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install -c constraints.txt "optimum-onnx[onnxruntime]" "optimum-intel[openvino]" pillow pytest
	@touch $@

$(OLDEST_BIN)/python:
	$(PYTHON) -m venv .venv-oldest

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
