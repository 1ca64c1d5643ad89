# `make demo` and `make test` set up everything they need in .venv; a second run reinstalls nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUT ?= runs/demo

.PHONY: demo test test-all check audit faults soak clean

demo: $(INSTALLED)
	$(BIN)/lgc compare --recipe digits --workers 4 --epochs 12 --checkpoint-every 100 --out $(DEMO_OUT)

# In the order of tests/conftest.py, the longest files first; three at a time, as some only wait.
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST)

# With all cells of all grids, those of faults among them; about an hour and a half.
test-all: $(INSTALLED)
	$(PYTEST) -m "not long"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/audit.py --offline-passes

# As in check, but fails where the vulnerability service cannot be reached or does not know a package.
audit: $(INSTALLED)
	$(BIN)/python tools/audit.py

# All cells of the fault grid, an hour or two; one of them is in the suite.
faults: $(INSTALLED)
	$(BIN)/pytest --numprocesses 2 -m "not long" tests/test_fault_grid.py

# Ten random faults in one job, a few minutes; SOAK_SEED=N repeats one.
soak: $(INSTALLED)
	$(BIN)/pytest -m long -k soak tests/test_fault_grid.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUT)
