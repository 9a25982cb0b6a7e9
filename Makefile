# make check | test | test-slow | fuzz | demo | bench | gpu-report | docs | lint. The first call makes .venv, installs pinned dependencies and builds; later calls start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f)
# Three sizes in about 3 minutes on 2 cores.
DEMO_ARGS ?= --sizes 3 --layers 3
PACKAGES := zsl_kernels python tests benchmarks examples docs/_plugins setup.py

.PHONY: all check test test-slow fuzz demo bench gpu-report docs lint format clean
all: $(VENV)/.built

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# Workers take tests as tests/tiers.py says.
PYTEST := ZSL_REQUIRE_NATIVE=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

# Every op on the processor's best instructions, and every model of the probe's zoo: under a minute on 2 cores.
check: $(VENV)/.built
	$(PYTEST) -m check $(PYTEST_ARGS)

# Every test but the slow ones.
test: $(VENV)/.built
	$(PYTEST) $(PYTEST_ARGS)

# What a release needs beside `make test`: sanitizers, all builds of GPU kernels, and the cases of which `make test` runs a sample.
test-slow: $(VENV)/.built
	$(PYTEST) -m slow $(PYTEST_ARGS)

# 2000 random models under the probe, three passes each, against one backward pass for each example, and 20,000 damaged files for the
# readers: 4 to 6 minutes on 2 cores.
fuzz: $(VENV)/.built
	$(BIN)/python -m tests.zerosum.fuzz --count 2000 --seed 0 --jobs 2
	$(BIN)/python -m tests.zerosum.fuzz_readers --count 20000 --seed 0

demo: $(VENV)/.built
	$(BIN)/zerosum demo $(DEMO_ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks $(BENCH_ARGS)

# Compiles the GPU kernels and predicts their speed, without a GPU: benchmarks/results/gpu_report.md.
gpu-report: $(VENV)/.built
	$(BIN)/python -m benchmarks.gpu.report

# The documentation as a site, site/index.html, in an environment of its own, without torch. A warning is an error.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

lint: $(VENV)/.built
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.built
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf $(VENV) $(VENV)-docs site build *.egg-info zsl_kernels/*.so
