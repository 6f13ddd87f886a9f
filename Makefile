# Commands: `make demo`, `make figures`, `make test`. All create .venv and install into it first.
PYTHON ?= python3
BIN := .venv/bin
SHOWN := docs/records
INPUTS := pyproject.toml constraints.txt

.PHONY: demo figures test test-long faults lint types clean

demo: .venv/installed  ## train, prune, record, check and draw, into out/demo
	rm -rf out/demo
	$(BIN)/python -m dynamics sweep configs/demo.yaml -o out/demo
	$(BIN)/python -m figures out/demo/*.zarr -o out/demo
	@echo && $(BIN)/python -m analysis --brief out/demo/*.zarr && echo
	@echo "Next: open out/demo/report.html, run python -m analysis out/demo/*.zarr for all figures of agreement,"
	@echo "or explore a record with xarray.open_datatree(\"out/demo/....zarr\") as notebooks/instrument.ipynb does."

figures: .venv/installed  ## redraw every figure of docs/results.md from its records; RECORDS="out/demo/*.zarr" draws others
ifdef RECORDS
	$(BIN)/python -m figures $(RECORDS) -o out/figures
else
	$(BIN)/python -m figures $(SHOWN)/laptop.zarr.zip -o out/figures
	$(BIN)/python -m figures $(SHOWN)/training_mode/prunings.zarr.zip -o out/figures/training_mode
	$(BIN)/python -m figures $(SHOWN)/full_width/*.zarr.zip -o out/figures/full_width
endif
	@echo "Next: open out/figures/report.html, or run python -m analysis $(or $(RECORDS),$(SHOWN)/laptop.zarr.zip) for the tables and claims."

test: .venv/installed-test lint  ## tests and linter, but for the long tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

test-long: .venv/installed-test  ## the long tests: README and docs as printed, notebooks, trainings killed at each instant
	$(BIN)/python -m pytest -n auto --dist worksteal -m long

faults: .venv/installed-test  ## kill writers of records 100 times at random; `make test` does it 8 times
	THETADOT_KILLS=100 $(BIN)/python -m pytest tests/faults

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-test  ## check the annotations
	$(BIN)/mypy

clean:  ## remove what the commands made
	rm -rf .venv out *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/created:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'thetadot needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	touch $@

.venv/installed: .venv/created $(INPUTS)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/created $(INPUTS)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,frameworks,shrink]'
	touch $@ .venv/installed
