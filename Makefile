# make train · make test: each sets up all it needs, in .venv, and does nothing twice.

.DEFAULT_GOAL := train
.PHONY: train test lint goldens clean

VENV := .venv
PY := $(VENV)/bin/python

# The first interpreter that is new enough.
BASE_PYTHON = $(shell for p in python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

train: $(VENV)/installed
	$(PY) -m rattn.train --config configs/tiny.py --workdir runs/tiny

test: $(VENV)/installed
	$(PY) -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

goldens: $(VENV)/installed
	$(PY) -m pytest tests/rattn/test_goldens.py --regenerate-goldens

$(VENV)/installed: requirements.lock setup.cfg
	@test -n "$(BASE_PYTHON)" || { echo "rattn needs Python 3.12 or newer and found none on the PATH; install one and type the command again."; exit 1; }
	@echo "Installing requirements.lock into $(VENV), about three minutes."
	test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq --no-deps -r requirements.lock
	$(PY) -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) .cache
