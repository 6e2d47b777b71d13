# `make demo` and `make test` work in a fresh clone: each sets up .venv first, and only once.
# Others: `make help`. To use another Python: `make PYTHON=python3.12 test`.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HARNESS := $(VENV)/.harness
CLIENTS := $(VENV)-clients/.ready
CLUSTER := $(VENV)-cluster/.ready
PEERS := $(or $(LFM2_FAST_PEERS_DIR),build/peers)/.ready
# One worker with one thread on each core (tests/conftest.py); idle workers take tests of others.
# Python keeps its compiled files, even if the shell forbids that: tests start it a hundred times.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -p no:benchmark -n auto --maxprocesses=16 --dist=worksteal
# Folders without tests for `make check` (MARKS in tests/conftest.py), which it need not import.
UNCOLLECTED := $(addprefix --ignore=tests/, bench clients export kernels packaging)
SIZE := 350M
SANITIZER := -fsanitize=address,undefined
SANITIZED := $(addprefix ../../tests/, csrc/test_checks.py csrc/test_cpu.py csrc/test_flash_prefill.py \
	csrc/test_groups.py csrc/test_linear.py csrc/test_low_rank.py csrc/test_sampling.py ops/test_native_ops.py)
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$p && break; done)

.PHONY: help demo test test-clients test-cluster test-export check nightly lint peers bench bench-report
.PHONY: bench-gpu bench-gpu-peers probe-gpu first-gpu tune-gpu aot sanitize
.PHONY: test-gpu test-arm wheel clean
.DEFAULT_GOAL := help

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 24

demo: $(READY) ## Stream text from the small LFM2 checkpoint in the package
	@$(BIN)/lfm2-fast demo

test: lint ## Check style and types, then run every test but the long proofs
	$(PYTEST) -m "not (nightly or cluster)"

check: lint ## Check style and types, then run the quick tests
	$(PYTEST) -m "not (slow or interpreter or build or bench or nightly or cluster)" $(UNCOLLECTED)

nightly: lint $(HARNESS) ## Run all tests, long proofs too; write bench/results/nightly.json
	PYTHONPATH=. $(PYTEST) -m "not cluster" -p bench.report.nightly --nightly-record bench/results/nightly.json

test-clients: $(READY) $(CLIENTS) ## Test the server with clients of other projects, in their own venv
	LFM2_FAST_PYTHON=$(abspath $(BIN))/python $(VENV)-clients/bin/pytest -p no:cacheprovider --confcutdir=tests/clients tests/clients

test-export: $(READY) ## Export the small checkpoint by the vendors' programs, in environments of their own
	$(BIN)/pytest -p no:benchmark -n0 -v tests/export/real_exports.py

test-cluster: $(CLUSTER) ## Kill replicas, nodes and proxies of a simulated Ray cluster, in a venv of its own
	PYTHONPATH=. OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 PATH=$(abspath $(VENV)-cluster/bin):$$PATH \
	$(VENV)-cluster/bin/python -m pytest -p no:benchmark -p no:cacheprovider -m "cluster or not nightly" tests/cluster

lint: $(READY) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

peers: $(PEERS) ## Build llama.cpp's programs for this processor, once

bench: $(PEERS) ## Compare with Hugging Face and llama.cpp on the CPU; SIZE=1.2B for another shape
	@echo "every case says how long it has left; larger shapes take as much longer as they are larger"
	@$(BIN)/pip install -q -c constraints.txt gguf
	$(BIN)/python -m bench.cpu.peers --size $(SIZE)

bench-report: $(READY) ## Rewrite the tables of the documentation from bench/results
	$(BIN)/python -m bench.report.tables

aot: $(READY) ## Compile the Triton kernels without a GPU; print a table of their registers
	$(BIN)/python bench/gpu/aot.py

test-gpu: ## On a GPU, offline, with PYTHON: the kernels' tests, memcheck, racecheck
	PYTHON=$(PYTHON) bench/gpu/test_gpu.sh

test-arm: $(READY) ## Cross-compile for AArch64; run the CPU code's tests and the package under emulation
	PYTHON=$(abspath $(BIN))/python tests/arm/run.sh

bench-gpu: ## On a GPU, offline, under nine minutes: the gate, then what decoding takes, as JSON
	PYTHONPATH=. TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 timeout 530 $(PYTHON) -m bench.gpu.decode

probe-gpu: ## On a GPU, offline, under nine minutes: races, rows, int8, sampling, threads beside predictions
	PYTHONPATH=. TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 timeout 530 $(PYTHON) -m bench.gpu.probe

first-gpu: ## On a GPU, offline, 40 minutes: the probe, the tests, tuning and benchmarks, whatever fails
	-$(MAKE) probe-gpu PYTHON=$(PYTHON)
	-$(MAKE) test-gpu PYTHON=$(PYTHON)
	-$(MAKE) tune-gpu PYTHON=$(PYTHON)
	-$(MAKE) bench-gpu PYTHON=$(PYTHON)
	-$(MAKE) bench-gpu-peers PYTHON=$(PYTHON)

bench-gpu-peers: ## On a GPU, offline, under nine minutes: beside Hugging Face, eager and compiled
	PYTHONPATH=. TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 timeout 530 $(PYTHON) -m bench.gpu.peers

tune-gpu: ## On a GPU, offline, under nine minutes: measure tilings, write kernels/tuned.py
	PYTHONPATH=. TRITON_INTERPRET=0 timeout 530 $(PYTHON) -m bench.gpu.tune

# Python itself is not instrumented, so the sanitizer's library must come first, and leaks are not
# looked for.
sanitize: $(READY) ## Run the tests of the C++ code under AddressSanitizer and UBSan
	PATH=$(abspath $(BIN)):$$PATH LDFLAGS="$(SANITIZER)" \
	CFLAGS="$(SANITIZER) -fno-sanitize-recover=all -fno-omit-frame-pointer" LFM2_FAST_BUILD_EXT=1 \
	$(BIN)/python setup.py -q build --build-lib build/sanitize --build-temp build/sanitize.tmp
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(abspath $(BIN))/python -m pytest -c ../../pyproject.toml -o pythonpath= $(SANITIZED)

wheel: $(READY) ## Build the sdist and, from it, the wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean: ## Remove all that the other targets made
	rm -rf $(VENV) $(VENV)-clients $(VENV)-cluster tests/clients/node/node_modules build dist lfm2_fast.egg-info lfm2_fast/*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: the extension is built against it, where there is a compiler.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt ninja setuptools torch
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[test,dev,server]'
	@touch $@

# The extra "eval", without building the package once more: two minutes, 600 MB.
$(HARNESS): $(READY)
	$(BIN)/pip install -c constraints.txt 'lm_eval[hf]'
	@touch $@

# A server has none of its clients' packages, and some of them pin others than the package does.
$(CLIENTS): $(wildcard tests/clients/*.txt) tests/clients/node/package.json | $(BIN)/pip
	$(PYTHON) -m venv --clear $(VENV)-clients
	$(VENV)-clients/bin/pip install -r tests/clients/requirements.txt
	$(VENV)-clients/bin/pip install --no-deps -r tests/clients/requirements-without-dependencies.txt
	cd tests/clients/node && if command -v npm; then npm install --no-audit --no-fund --no-package-lock; fi
	@touch $@

# Ray brings other event loops for the server: its venv sees the packages of .venv, not the reverse.
$(CLUSTER): tests/cluster/requirements.txt constraints.txt | $(READY)
	$(BIN)/python -m venv --clear $(VENV)-cluster
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
	> "$$($(VENV)-cluster/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth"
	$(VENV)-cluster/bin/pip install -c constraints.txt -r tests/cluster/requirements.txt
	@touch $@

$(PEERS): constraints.txt | $(READY)
	$(BIN)/python -m bench.cpu.llama_build
	@touch $@

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "no Python from 3.10 to 3.14 is on PATH" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
