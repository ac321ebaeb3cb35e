# Two commands set everything up: `make demo` and `make test`. Each creates .venv itself if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two processes, each with whole files as far as it goes: what a file computes for all of its tests is computed once.
SHARED := -n 2 --dist worksteal
# Neither they nor what they start fights for cores.
test hunt search: export OMP_NUM_THREADS = 1

.PHONY: demo test hunt search mutants plain lint types check bench coverage docs clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=23.2"
	$(BIN)/python -m pip install --quiet -e ".[dev,demo,vision,timm,onnx,lightning,experiments,torch-pruning,ray,study]"
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# What a contributor runs before a commit: four to five minutes on two cores. The examples of docstrings are among it.
test: $(STAMP)
	$(BIN)/python -m pytest $(SHARED) -m "not hunt" -rs --doctest-modules --doctest-ignore-import-errors tests src/pathlift

# All other tests: more operators for each law, more random networks, larger models.
hunt: $(STAMP)
	$(BIN)/python -m pytest $(SHARED) -m "hunt and not search"

# What is too long for the hunt, and the random tests for hours: every wrong value of every argument, every region around every call, adversarial weights.
search: $(STAMP)
	$(BIN)/python -m pytest $(SHARED) -m search
	PATHLIFT_SEARCH=30 $(BIN)/python -m pytest $(SHARED) tests/test_hunt.py tests/test_metric_hunt.py tests/test_process.py \
		tests/test_random_networks.py tests/test_axes.py tests/test_quantisation.py
	PATHLIFT_SEARCH=50 $(BIN)/python -m pytest $(SHARED) tests/test_arguments.py

# One hour of small changes of passes/ and edges/, one at a time: which of them do the quick tests not notice?
mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet cosmic-ray coverage
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

plain: $(STAMP)
	rm -rf build/plain
	$(BIN)/python tests/plain.py build/plain

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types plain test

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[fast]"
	$(BIN)/python benchmarks/speed.py

coverage: $(STAMP)
	$(BIN)/python benchmarks/support.py

# The site of docs/ in build/site: pages, figures and examples are run first, which takes some minutes on all cores; again only what has changed.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
