# Everything a developer runs. Works with GNU make 3.81 (macOS) and later; `make` lists the targets.
#
# Three environments: .venv to work in; .venv-build that generates the stubs, because the generator
# needs an older protobuf than the server runs on; .venv-bench with what `make bench` compares the
# federation with. All are pinned and hashed in requirements/.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BUILD := .venv-build
BENCH := .venv-bench
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all:
PROTOS := $(wildcard proto/federation/v1/*.proto)

# Stamps: each is newer than what it was made from, so that nothing is done twice.
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed
BUILD_LOCKED := $(BUILD)/.locked
BENCH_LOCKED := $(BENCH)/.locked
STUBS := federation/.generated

.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:
.PHONY: help install run test check lint types proto-check breaking layers format proto bench bench-scale soak fuzz lock clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  ARGS=…          is passed on by run, test, bench, bench-scale, soak and fuzz:  make test ARGS='-k presence'"
	@echo "  DATABASE_URL=…  a PostgreSQL of your own for run and test, instead of the embedded one"
	@echo "  PYTHON=…        the Python (3.11 or later) that makes the environments"

install: $(INSTALLED) ## make .venv with everything in it; quick when nothing changed

run: install ## run a federation with a demo neuron (Ctrl-C stops it)
	@exec $(BIN)/federation up $(ARGS)

# Three files at a time: most tests wait for processes, and few for a processor.
test: install ## run the tests
	@exec $(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

check: lint types proto-check breaking layers ## everything but the tests: style, types, contract, layers

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# buf insists on a cache folder, also where HOME is not set.
BUF = BUF_CACHE_DIR="$(CURDIR)/.cache/buf" $(BIN)/buf
GIT = git -c safe.directory='*'

proto-check: install
	$(BUF) lint proto
	$(BUF) format -d --exit-code proto

# Compares with main as git has it: its own branch, or the remote's in a checkout that has no other.
# The files are unpacked, because buf itself cannot read a worktree's or a shallow clone's .git.
breaking: install
	@for ref in $(BASE) refs/heads/main refs/remotes/origin/main; do \
	    if $(GIT) cat-file -e "$$ref:proto/buf.yaml" 2>/dev/null; then base=$$ref; break; fi; \
	done; \
	if [ -z "$$base" ]; then echo "buf breaking: skipped, no main branch with a proto/ is known here"; exit 0; fi; \
	old=$$(mktemp -d) && trap 'rm -rf "$$old"' EXIT && \
	echo "buf breaking proto --against $$base" && \
	$(GIT) archive "$$base" proto | tar -x -C "$$old" && \
	$(BUF) breaking proto --against "$$old/proto"

layers: install
	@$(BIN)/python -m pytest -q tests/unit/test_layering.py

format: install ## rewrite Python and proto files in the common format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BUF) format -w proto

proto: $(BUILD_LOCKED) ## generate the stubs again
	@$(call generate_stubs)

bench: install $(BENCH_LOCKED) ## measure; prints figures, proves nothing
	@exec $(BIN)/python -m benchmarks $(ARGS)

bench-scale: install $(BENCH_LOCKED) ## thousands of streams, restarts, outages; some forty minutes
	@exec $(BIN)/python -m benchmarks.scale $(ARGS)

soak: install ## break everything at random for an hour (ARGS="--seconds 600 --seed 7")
	@LEDGER_EXAMPLES=500 $(BIN)/python -m pytest -q tests/integration/test_ledger_model.py
	@exec $(BIN)/python -m tests.support.soak $(ARGS)

fuzz: install ## send the server what nobody should, for ten minutes (ARGS="--seconds 600 --seed 7")
	@exec $(BIN)/python -m tests.fuzz.campaign $(ARGS)

clean: ## remove everything that make made, but not the federation's data
	rm -rf $(VENV) $(BUILD) $(BENCH) federation dist build .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- how install works ---

# $(call make_venv,folder): keep a venv that works, else make it anew; say in one line what is missing.
define make_venv
if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
    command -v "$(PYTHON)" >/dev/null || { \
        echo "make: $(PYTHON) not found; install Python 3.11 or later, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
        echo "make: $$("$(PYTHON)" --version 2>&1) is too old; name one that is 3.11 or later: make PYTHON=python3.12" >&2; exit 1; }; \
    "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
        echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
    "$(PYTHON)" -m venv --clear $(1); \
fi
endef

define generate_stubs
PATH="$(CURDIR)/$(BUILD)/bin:$$PATH" $(BUILD)/bin/python hatch_build.py && touch $(STUBS)
endef

$(LOCKED): requirements/dev.lock
	@$(call make_venv,$(VENV))
	@echo "Installing the locked packages into $(VENV) …"
	@$(BIN)/python $(PIP_INSTALL) --require-hashes -r requirements/dev.lock
	@touch $@

$(BUILD_LOCKED): requirements/build.lock
	@$(call make_venv,$(BUILD))
	@echo "Installing the stub generator into $(BUILD) …"
	@$(BUILD)/bin/python $(PIP_INSTALL) --require-hashes -r requirements/build.lock
	@touch $@

$(BENCH_LOCKED): requirements/bench.lock
	@$(call make_venv,$(BENCH))
	@echo "Installing what the figures are compared with into $(BENCH) …"
	@$(BENCH)/bin/python $(PIP_INSTALL) --require-hashes -r requirements/bench.lock
	@touch $@

# The folder's own time tells of a file that was removed.
$(STUBS): $(BUILD_LOCKED) hatch_build.py proto/federation/v1 $(PROTOS)
	@echo "Generating the stubs from proto/ …"
	@$(call generate_stubs)

# An editable install: a wheel that holds the path of this checkout and the two commands.
$(INSTALLED): $(LOCKED) $(STUBS) pyproject.toml federation_server/__init__.py
	@echo "Installing federation into $(VENV) …"
	@rm -rf $(BUILD)/dist
	@PATH="$(CURDIR)/$(BUILD)/bin:$$PATH" $(BUILD)/bin/python -c 'from hatchling.build import build_editable; build_editable("$(BUILD)/dist")'
	@$(BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall $(BUILD)/dist/*.whl
	@touch $@

# --- pinning ---

# One lock for every platform and Python that is supported. `make lock ARGS=--upgrade` takes newer versions.
UV = $(BUILD)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
     --custom-compile-command "make lock" $(ARGS)

lock: ## pin the developers' packages anew (ARGS=--upgrade for newer ones)
	@$(call make_venv,$(BUILD))
	@$(BUILD)/bin/python $(PIP_INSTALL) uv
	$(UV) pyproject.toml --extra server --group dev -o requirements/dev.lock
	$(UV) --group bench -o requirements/bench.lock
	@$(BUILD)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(BUILD)/build.in
	$(UV) $(BUILD)/build.in --no-annotate -o requirements/build.lock
