.PHONY: install run test test-slow test-browser lint bench picture

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

run: install  ## SGD, then ImbSAM, on long-tailed digits; ends with both rows of the table
	$(BIN)/imbsam fit --config configs/digits_lt/sgd.yaml
	$(BIN)/imbsam fit --config configs/digits_lt/imbsam.yaml
	$(BIN)/imbsam report logs/digits_lt/sgd logs/digits_lt/imbsam

test: install  ## what every change must pass
	$(BIN)/python -m pytest -q

test-slow: install  ## torch.compile
	$(BIN)/python -m pytest -q -m slow

test-browser: install  ## the report in Chromium (on Debian: apt-get install chromium chromium-driver)
	$(BIN)/python -m pip install --quiet --editable ".[browser]"
	$(BIN)/python -m pytest -q -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

picture: install  ## the README's picture: five seeds of three methods on long-tailed digits, 5 minutes and more
	for method in sgd sam imbsam; do \
		$(BIN)/python scripts/run_seeds.py 0 1 2 3 4 -- --config configs/digits_lt/$$method.yaml \
			--trainer.logger.init_args.save_dir=logs/picture || exit 1; \
	done
	$(BIN)/imbsam report $(addprefix logs/picture/digits_lt/,sgd sam imbsam) --output docs/digits_lt.png

bench: install  ## a short version of the cost table
	$(BIN)/python benchmarks/step_cost.py --short
