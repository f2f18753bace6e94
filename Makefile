# Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PROMPT ?= a fox on a night sky background

.PHONY: demo test lint fmt clean bench-check

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(STAMP)  ## one composed picture, adapters found for PROMPT
	$(BIN)/compose generate --prompt "$(PROMPT)" --auto-retrieve --out demo.png
	@echo "demo.png"

demo-ui: $(STAMP)  ## the studio in the browser, on this machine only
	$(BIN)/compose ui

test: $(STAMP)  ## the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff, as CI runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-check: $(STAMP)  ## every row of benchmarks/results that misses its target
	$(BIN)/python -m benchmarks.check

bench-retrieval: $(STAMP)  ## finding adapters: make bench-retrieval [ZOO=folder] [ROWS=id,...] [QUICK=1]
	$(BIN)/python -m benchmarks.retrieval $(if $(ZOO),--zoo $(ZOO)) $(if $(ROWS),--rows $(ROWS)) $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.readme

bench-%: $(STAMP)  ## one question: make bench-base [ROWS=id,...] [QUICK=1]
	$(BIN)/python -m benchmarks.$* $(if $(ROWS),--rows $(ROWS)) $(if $(QUICK),--quick)
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) build *.egg-info
