# The front door. `make demo` and `make test` are all that a fresh machine with Python and make needs.
#
# The environment lives in .venv. It is made by the first Python >= 3.11 found (or by PYTHON=...), and again
# only when pyproject.toml changes. BASE_PYTHON, PYTEST_WORKERS and PYTEST_ARGS may be set on the command line.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILED := .venv-compiled
COMPILED_STAMP := $(COMPILED)/.installed
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed
PYTHON ?=
# One more than cores: half of the time the tests wait for something.
PYTEST_WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 2 ? 3 : n > 4 ? 5 : n + 1)))
PYTEST_ARGS ?=
CHECKED := portero_py tests benchmarks $(wildcard examples) .ci

# What reads bytes of the outside world, and so must hold in the compiled build too.
COMPILED_TESTS := tests/test_compiled.py $(patsubst %,tests/e2e/test_%.py,http1_malformed http1_hostile_backends \
	http2_malformed http2_floods faults peers replies forwarding websockets prior_knowledge slow_peers lifecycle \
	churn certificate_reload workers access_log shared_state tickets descriptors abuse ejection frozen queue \
	balancing gates routes service_bounds)

.PHONY: help demo test test-compiled test-slow compiled check format coverage packages bench bench-quick faults clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## two backends, certificates and the proxy on this machine, with the curl lines to try
	@exec $(BIN)/portero-py demo

test: $(STAMP) packages coverage  ## the whole suite, and 100% branch coverage of core and wire
	$(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

compiled: $(COMPILED_STAMP)  ## the compiled build (docs/compiled.md), in .venv-compiled; needs a C compiler

test-compiled: $(STAMP) $(COMPILED_STAMP) packages  ## the conformance, smuggling and fault suites against it
	PORTERO_TEST_PYTHON=$(COMPILED)/bin/python $(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal \
		$(COMPILED_TESTS) $(PYTEST_ARGS)

# One after the other: each wants the machine for itself. `make test` does not collect tests/slow.
test-slow: $(STAMP)  ## what takes minutes: a soak, faults under load (PORTERO_CHAOS_SEED, _SECONDS)
	@SLOW=1 .ci/packages
	$(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal -m minutes tests/e2e $(PYTEST_ARGS)
	$(BIN)/pytest -n 0 tests/slow $(PYTEST_ARGS)

check: $(STAMP)  ## formatting, lint and types
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy portero_py tests benchmarks

format: $(STAMP)  ## rewrite the files as `check` wants them
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# The pure tests alone must reach every branch: what only a socket reaches does not belong in core or wire.
coverage: $(STAMP)  ## branch coverage of core and wire by their own tests
	$(BIN)/coverage run -m pytest -q -p no:cacheprovider tests/core tests/wire
	$(BIN)/coverage report

packages:  ## the Debian packages that the tests use, where they can be installed
	@.ci/packages

bench: $(BENCH_STAMP)  ## CPU time a request beside nginx, HAProxy and Caddy, to benchmarks/RESULTS.md (half an hour)
	@BENCH=1 .ci/packages
	$(BENCH)/bin/python -m benchmarks.bench --results benchmarks $(BENCH_ARGS)

bench-quick: $(BENCH_STAMP)  ## the main rows of it, in under two minutes
	@BENCH=1 .ci/packages
	$(BENCH)/bin/python -m benchmarks.bench --quick $(BENCH_ARGS)

faults: $(BENCH_STAMP)  ## what clients lose under faults, beside the same peers, to docs/reliability.md (an hour)
	@BENCH=1 .ci/packages
	$(BENCH)/bin/python -m benchmarks.faults --results benchmarks/faults/results.json $(FAULTS_ARGS)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) $(BENCH) $(COMPILED) build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache .demo
	find portero_py tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml .ci/environment
	@PYTHON="$(PYTHON)" .ci/environment $(VENV)
	@touch $@

$(BENCH_STAMP): pyproject.toml .ci/environment
	@PYTHON="$(PYTHON)" .ci/environment $(BENCH) bench
	@touch $@

$(COMPILED_STAMP): pyproject.toml .ci/environment .ci/hatch_build.py $(shell find portero_py -name '*.py')
	@PYTHON="$(PYTHON)" .ci/environment $(COMPILED) compiled
	@touch $@
