# The commands of this project. Each sets up what it needs; `make setup` alone does it ahead of time.
.DEFAULT_GOAL := help
.PHONY: help setup demo run test soak check format bench proto capo-tiny clean

# Two busy OpenMP runtimes on few cores slow each other down up to 20 times; waiting threads must sleep, not spin.
export OMP_WAIT_POLICY ?= PASSIVE

BIN := .venv/bin
# Where tests may start the real engine (tests/test_house.py holds it). They take the whole machine, one after another,
# but for those marked `beside`. These and all others run three at a time, for two cores are half idle with two, file by
# file in their order: the files of few tests are the slow ones, and must not come last.
ENGINE_TESTS := tests/e2e tests/soak tests/fuzz tests/serve/test_engine_repairs.py

help:            ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup:           ## Install into .venv (CPU or GPU, whichever fits)
	@scripts/setup.sh

demo: setup      ## The main job end to end: upload, tune, serve, ask
	@$(BIN)/capo demo

run: setup       ## Start the service on http://127.0.0.1:8000 with its data in ./capo-data
	@$(BIN)/capo serve

test: setup      ## The whole test suite
	-@scripts/test_programs.sh
	@failed=; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not engine or beside" -n 3 --dist loadfile --no-loadscope-reorder || failed=1; \
	$(BIN)/python -m pytest -m "engine and not beside" $(ENGINE_TESTS) || failed=1; \
	[ -z "$$failed" ]

soak: setup      ## The long proofs in full: flips, churn, hostile adapters, kills; figures go to build/soak.json
	-@scripts/test_programs.sh
	@CAPO_LONG=1 $(BIN)/python -m pytest tests/soak tests/fuzz \
		$$(grep -rl --include='test_*.py' 'from tests.sizes' tests | grep -v -e /soak/ -e /fuzz/) -v --timeout 7200

check: setup     ## Format, lint, types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup    ## Rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: setup     ## Measure on this machine: serving against bare vLLM, training against TRL (ten minutes)
	@$(BIN)/python -m bench serving
	@$(BIN)/python -m bench training

proto: setup     ## Generate the gRPC stubs from proto/
	@scripts/proto.sh

capo-tiny: setup ## Make the embedded base model again from its recipe
	@$(BIN)/python -m examples.capo_tiny.build

clean:           ## Remove what the commands above made, .venv included
	rm -rf .venv build capo-data *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
