# `make demo` and `make test` set up .venv by themselves when it is missing or older than what it is made from.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench compare docs docs-serve clean

demo: $(READY)
	$(BIN)/python train.py hydra.run.dir=outputs/demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p supsup_lightning

bench: $(READY)
	mkdir -p outputs
	$(BIN)/python benchmarks/targets.py --json outputs/bench.json --out outputs

compare: $(READY)
	$(BIN)/python benchmarks/compare.py permuted_mnist
	$(BIN)/python benchmarks/compare.py split_cifar100

# The notice is the theme's, about a later version of MkDocs.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-serve: $(READY)
	NO_MKDOCS_2_WARNING=1 DOCS_RUN_NOTEBOOKS=false $(BIN)/mkdocs serve

$(READY): pyproject.toml constraints.txt hatch_build.py supsup_lightning/native/packed_bits.c
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv outputs site
