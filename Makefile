# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the virtual
# environment that it needs; one that was interrupted takes it up again. PYTHON names the Python to use.

PYTHON ?= python3
PYTEST ?= -n auto --dist worksteal
OUT ?= report

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types bench results leagues gallery docs gpu format setup setup-demo setup-docs models clean

# Several workers share the cores, so a worker takes one.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: setup-demo ## fetch the demo model, run the report on it, say where the report is
	@.venv-demo/bin/polyhead fetch smollm2
	@.venv-demo/bin/polyhead report smollm2 --out $(OUT)/

test: setup lint types models ## lint, types and tests
	$(TEST_ENV) .venv/bin/python -m pytest $(PYTEST)

test-slow: setup models ## the tests that compile or run for minutes
	$(TEST_ENV) .venv/bin/python -m pytest $(PYTEST) -m slow

lint: setup ## ruff, without changing anything
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup ## mypy
	.venv/bin/mypy

format: setup ## let ruff mend what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup ## every benchmark, each against its yardstick in the same run
	.venv/bin/polyhead bench

results: setup models ## run the benchmarks, and the experiments that have no result yet, into docs/results/
	.venv/bin/polyhead bench --save docs/results/benchmarks
	.venv/bin/python tools/experiments.py

leagues: setup ## train the leagues of docs/results/league/ and write their page: hours, and goes on where it was cut
	.venv/bin/python tools/leagues.py

gallery: setup ## make the pages of the catalogue anew from the registry, in docs/gallery/
	.venv/bin/polyhead gallery --out docs/gallery

docs: setup-docs ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "the documentation is in site/index.html"

gpu: ## tests and benchmarks for CUDA, with the torch that PYTHON already has
	@$(PYTHON) -c "import torch; assert torch.cuda.is_available()" 2>/dev/null \
		|| { echo "error: $(PYTHON) has no torch that sees a CUDA device"; exit 1; }
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu
	PYTHONPATH=src $(PYTHON) -m polyhead bench --device cuda

setup: ## the environment for development, .venv
	@$(PYTHON) tools/venv.py .venv --extras dev

setup-demo:
	@$(PYTHON) tools/venv.py .venv-demo --extras hf,report,compare

setup-docs:
	@$(PYTHON) tools/venv.py .venv-docs --only docs

models: setup ## the two small real models that tests and benchmarks use
	@.venv/bin/polyhead fetch smollm2 minilm

clean: ## remove the environments and what was built
	rm -rf .venv .venv-demo .venv-docs site .cache .mypy_cache .ruff_cache .pytest_cache
