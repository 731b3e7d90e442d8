# Every target does its own set-up: tools/setup.sh makes .venv and says what is missing when it cannot.
# The packet path is built in the profile FASTLB_PROFILE (release, quick, debug, coverage or asan; see setup.py).

PY := .venv/bin/python
PYTEST := $(PY) -m pytest
JOBS := $(shell nproc)
# Tests run in as many processes as there are cores; tests/conftest.py says which of them stay together.
PARALLEL := -n $(JOBS) --dist loadscope
STAMP := .venv/set-up
TRANSMIT := auto
WORKERS := 1
COVERAGE := build/coverage
COVERED := tests/unit tests/property tests/ext --ignore=tests/ext/test_embed.py --ignore=tests/ext/test_recipes.py \
	tests/netns/test_frames.py tests/netns/test_worker.py
FLOOR := 94

.PHONY: help demo interop test test-long stage build lint docs bench asan coverage clean

help: ## this list
	@echo "fastlb: make one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

demo: build ## traffic through a lab of network namespaces, verified (root, or sudo; TRANSMIT=xdp|sendmmsg forces the way out, WORKERS=2)
	tools/as_root.sh $(PY) netns-lab/demo.py --transmit $(TRANSMIT) --workers $(WORKERS)

interop: build ## fastlb beside the kernel's own balancer (IPVS), in a Linux 6.1 by user-mode-linux (Debian; ten minutes)
	$(PY) netns-lab/uml.py netns-lab/interop.py

# First the tests in namespaces, then the others, each in parallel.
test: build ## all tests; those in namespaces need root, or sudo
	@if tools/as_root.sh --possible; then \
		set -x; tools/as_root.sh $(PYTEST) $(PARALLEL) tests/netns && \
		tools/as_root.sh $(PYTEST) $(PARALLEL) tests --ignore=tests/netns; \
	else \
		set -x; $(PYTEST) $(PARALLEL) tests --ignore=tests/netns && set +x && tools/as_root.sh $(PYTEST) $(PARALLEL) tests/netns; \
	fi

test-long: build ## the tests that are marked long, for minutes; `make test` runs them for seconds (root, or sudo)
	tools/as_root.sh $(PYTEST) --long -m long tests

stage: $(STAMP) ## the turn of edit, build and test: make stage STAGE=conntrack builds quickly and runs that stage's tests
	@FASTLB_PROFILE=quick $(PY) setup.py --quiet build_ext --inplace
	$(PYTEST) -q $(or $(wildcard tests/unit/*/test_$(STAGE).py),\
		$(error no tests/unit/*/test_$(STAGE).py; say which: make stage STAGE=conntrack))

build: $(STAMP) ## the extension module, in place; only what changed
	@$(PY) setup.py --quiet build_ext --inplace

lint: build docs ## ruff, mypy, cython-lint, stubtest, the gate on the generated C, and the documentation's links
	$(PY) -m ruff check . netns-lab/lab
	$(PY) -m mypy fastlb
	$(PY) -m mypy netns-lab
	$(PY) -m mypy --scripts-are-modules netns-lab/lab
	$(PY) -m mypy bench
	$(PY) -m mypy tools
	$(PY) -m mypy examples/embed/replay.py
	PATH=".venv/bin:$$PATH" cython-lint fastlb examples
	$(PY) -m mypy.stubtest fastlb._core
	$(PY) tools/nogil_gate.py fastlb/_core.c

# mkdocs.yml says that nothing may be wrong. (The variable silences a word about another program at each start.)
docs: build ## the documentation as a web site, build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

bench: build ## the core in memory, and the lab beside a bare reflector (root, or sudo)
	@echo "core, tables, disruption, loading and lab: half an hour on an idle machine, up to 7 GB of memory."
	$(PY) bench/core.py
	$(PY) bench/tables.py
	$(PY) bench/disruption.py
	$(PY) bench/loading.py
	tools/as_root.sh $(PY) bench/lab.py

# The interpreter itself is not instrumented: its runtime comes in by LD_PRELOAD, and leaks are its own.
asan: ## the tests that need no root, under AddressSanitizer and UBSan
	@FASTLB_PROFILE=asan $(MAKE) --no-print-directory build
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$($${CC:-cc} -print-file-name=libasan.so) \
		$(PYTEST) tests --ignore=tests/netns

# In a copy of the tree, so that the build in place stays what it is. COVERED=tests takes all tests, and minutes more.
coverage: $(STAMP) ## tests with assertions on; which lines they reach, and a floor for the packet path (root, or sudo)
	tools/as_root.sh rm -rf $(COVERAGE)
	mkdir -p $(COVERAGE)
	tar -c --exclude='./.*' --exclude=./build --exclude='*.so' --exclude=./fastlb/_core.c . | tar -x -C $(COVERAGE)
	cd $(COVERAGE) && FASTLB_PROFILE=coverage $(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cd $(COVERAGE) && tools/as_root.sh env FASTLB_PROFILE=coverage $(CURDIR)/$(PY) -m coverage run -m pytest -p no:cacheprovider $(PARALLEL) $(COVERED)
	cd $(COVERAGE) && $(CURDIR)/$(PY) -m coverage combine --quiet && $(CURDIR)/$(PY) -m coverage report
	$(PY) tools/coverage_lines.py --floor $(FLOOR) $(COVERAGE)

clean: ## everything that was built, the virtual environment too
	rm -rf .venv build dist *.egg-info fastlb/_core.c fastlb/_core.html fastlb/*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml setup.py tools/setup.sh
	@tools/setup.sh
	@touch $@
