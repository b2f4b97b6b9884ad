.PHONY: install run test test-processes test-slow test-gpu test-kill test-slurm test-browser lint docs bench picture

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

install: $(INSTALLED)  ## make the virtual environment

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

run: install  ## train SGD, then ImbSAM, on long-tailed digits, and print a table of both
	$(BIN)/imbsam fit --config configs/data/digits_lt.yaml --config configs/method/sgd.yaml
	$(BIN)/imbsam fit --config configs/data/digits_lt.yaml --config configs/method/imbsam.yaml
	$(BIN)/imbsam report logs/digits_lt/sgd logs/digits_lt/imbsam

test: install  ## the tests that every change must pass
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-processes: install  ## runs in processes of their own: DDP, torchrun, kill and resume, signals, W&B, the programs of docs, an installed wheel
	$(BIN)/python -m pytest -q -m "processes and not slow" -n 2 --dist loadfile

test-slow: install  ## torch.compile, SIGTERM to two processes, Ctrl-C at every line for every method
	$(BIN)/python -m pytest -q -m slow --ignore tests/lightning_modules/resuming/test_kill.py

test-gpu: install  ## the tests that need a GPU: CUDA graphs, no host synchronisation
	$(BIN)/python -m pytest -q -rs -m gpu

test-kill: install  ## kill and resume 20 runs, and print a table of them
	$(BIN)/python -m pytest -q -s -m slow tests/lightning_modules/resuming/test_kill.py

test-slurm: install  ## a run with three interruptions, under SLURM on this one machine; needs Debian's slurmctld, slurmd, slurm-client, munge
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/slurm/one_node.sh tests/slurm/preemption.sh

test-browser: install  ## the report in Chromium (on Debian: apt-get install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet --editable ".[browser]"
	$(BIN)/python -m pytest -q -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## build the documentation, docs/_build/html/index.html; a broken link is an error
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

picture: install  ## draw the picture of docs/report.md: five seeds each of SGD and ImbSAM on long-tailed digits, 5 minutes
	for method in sgd imbsam; do \
		$(BIN)/imbsam fit --config configs/data/digits_lt.yaml --config configs/method/$$method.yaml --seeds 0 1 2 3 4 \
			--trainer.logger.init_args.save_dir=logs/picture || exit 1; \
	done
	$(BIN)/imbsam report $(addprefix logs/picture/digits_lt/,sgd imbsam) --output docs/digits_lt.png

bench: install  ## a short version of the cost table
	$(BIN)/python benchmarks/step_cost.py --short
