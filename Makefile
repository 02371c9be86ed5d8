# Each target does its own set-up: a virtual environment in .venv with everything in it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SHELL  := /bin/bash

.PHONY: demo test check claims soak bench screenshots weights help
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## train the tiny sky model on synthetic clouds, about 5 minutes on 2 cores, and show where the clip is
	$(BIN)/python -m registry run lvdm-short-sky-tiny

test: $(READY) ## the whole test suite
	@command -v chromium chromium-browser google-chrome >/dev/null || echo "no Chromium: the test of MLflow's page is skipped; on Debian: apt install chromium"
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: $(READY) ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/registry/test_imports.py

claims: $(READY) ## what takes longer: that every twin learns, and trains on four ranks as on one
	$(BIN)/python -m pytest -m claims --timeout 3600 -s

soak: $(READY) ## an hour of kills and hostile files; KILLS=40 a twin, FUZZ_EXAMPLES=3000 a reader
	$(BIN)/python -m pytest -m soak --timeout 7200 -s
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-3000} $(BIN)/python -m pytest tests/fuzz --timeout 3600

bench: $(READY) ## a table of ratios against the bare limit
	$(BIN)/python -m benchmarks

screenshots: $(READY) ## the README's pictures of MLflow's page: three runs, one killed and resumed, about 10 minutes; needs Chromium
	$(BIN)/python -m tests.tracking.demo_runs build/screenshots
	$(BIN)/python -m tests.tracking.screenshots sqlite:///build/screenshots/mlflow.db docs

weights: $(READY) ## remake what ships with the project: two autoencoders, a text encoder, a tokenizer, a UNet with motion modules
	$(BIN)/python -m registry run lvdm-video-vae-tiny --output-dir runs/shipped-vae --overwrite
	$(BIN)/python -m registry measure-latents lvdm-short-sky-tiny --weights runs/shipped-vae --write
	$(BIN)/python -m core.weights.half runs/shipped-vae/export/vae core/weights/shipped/lvdm-video-vae-tiny
	$(BIN)/python -m registry run kl-vae-tiny --output-dir runs/first-kl-vae --overwrite
	$(BIN)/python -m registry run kl-vae-tiny --init-from runs/first-kl-vae --system.kl-weight 2e-4 --max-steps 500 --lr 1.5e-3 --output-dir runs/shipped-kl-vae --overwrite
	$(BIN)/python -m registry measure-latents kl-vae-tiny --weights runs/shipped-kl-vae --write
	$(BIN)/python -m core.weights.half runs/shipped-kl-vae/export/vae core/weights/shipped/kl-vae-tiny
	$(BIN)/python -m data.synthetic_captions --root runs/shipped-captions
	$(BIN)/python -m core.weights.text_tower runs/shipped-captions/train.csv core/weights/shipped/clip-text-tiny
	$(BIN)/python -m core.weights.word_pieces core/weights/shipped/word-pieces-tiny
	$(BIN)/python -m registry run animatediff-image-finetune-tiny --output-dir runs/shipped-image --overwrite
	$(BIN)/python -m core.weights.half runs/shipped-image/export/unet core/weights/shipped/animatediff-tiny/unet
	$(BIN)/python -m registry run animatediff-full-tiny --output-dir runs/shipped-motion --overwrite
	$(BIN)/python -m core.weights.half runs/shipped-motion/export/motion_adapter core/weights/shipped/animatediff-tiny/motion_adapter
