# The commands for developers. Each target installs what it needs into .venv, from the hash-locked requirements.

# The first of these that is new enough.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -E -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
BIN := .venv/bin

.PHONY: help run test faults check aws lock clean bench budget scaling
.DELETE_ON_ERROR:

# With the first, each process of the tests would compile the test tools again. With the others, the Python of .venv would
# not find the modules here, or would not end by itself.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONINSPECT PYTHONPATH PYTHONPLATLIBDIR PYTHONSAFEPATH PYTHONWARNINGS

# A user's settings for pip choose where packages come from, but not which ones, for which system, or where they go.
unexport PIP_ABI PIP_CONSTRAINT PIP_EDITABLE PIP_HELP PIP_IMPLEMENTATION PIP_ISOLATED PIP_PLATFORM PIP_PYTHON \
	PIP_PYTHON_VERSION PIP_REQUIREMENT PIP_VERSION
export PIP_DRY_RUN := 0

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

run: .venv/.local  ## run the whole system on this machine, PostgreSQL included; a minute the first time, then seconds; EXAMPLE=orders for the example
	@$(BIN)/python -u -m tools.local_stack

test: .venv/.dev  ## every test, against a real PostgreSQL and real sockets; 4 minutes on two cores
	$(BIN)/python -m pytest --numprocesses 4 --ignore tests/aws

faults: .venv/.dev .venv/.check  ## break every part under load, 20 minutes; writes the table in docs/faults.md
	FAULTS_TABLE=docs/faults.md $(BIN)/python -m pytest -m "matrix or fault"

check: .venv/.dev .venv/.check  ## lint, types, containers, Kubernetes schemas; 20 s
	@echo "ruff: lint"; $(BIN)/ruff check --quiet .
	@echo "ruff: format"; $(BIN)/ruff format --quiet --diff .
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "hadolint: Dockerfile"; $(BIN)/hadolint Dockerfile
	@if docker compose version >/dev/null 2>&1; then echo "docker compose: docker-compose.yml"; docker compose config --quiet; \
	else echo "docker-compose.yml is not checked: there is no docker compose here"; fi
	@# kubernetes-validate only warns about an unknown schema, so any output counts as a failure.
	@echo "kubernetes-validate: k8s.yaml for $(KUBERNETES)"; \
	said=$$($(BIN)/kubernetes-validate --strict --quiet $(KUBERNETES:%=-k %) k8s.yaml 2>&1) && test -z "$$said" || { echo "$$said"; exit 1; }
KUBERNETES := 1.37 1.36 1.35 1.34

aws: .venv/.dev .venv/.aws  ## lint and test aws/template.yaml and the commands of docs/aws.md, with thousands of deliberate faults, 1 minute; without AWS
	$(BIN)/python -m pytest tests/aws

bench: .venv-bench/.installed benchmarks/fastify/node_modules benchmarks/go/bin  ## measure against peers, 20 minutes; BENCH_OPTIONS=--quick for 4
	@.venv-bench/bin/python benchmarks/bench.py $(BENCH_OPTIONS)

budget: .venv-bench/.installed benchmarks/fastify/node_modules benchmarks/go/bin  ## measure where each microsecond of a request goes, 3 minutes
	@.venv-bench/bin/python benchmarks/budget.py $(BENCH_OPTIONS)

scaling: .venv-bench/.installed  ## measure how cost grows with load, 8 minutes on a quiet machine; writes the numbers in docs/scaling.md
	@.venv-bench/bin/python benchmarks/scaling.py $(BENCH_OPTIONS)

# The newest Python that the image may use, or python3 if it is missing. A separate environment, so that only benchmarks
# install its packages.
BENCH_PYTHON ?= $(shell python3.13 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)

.venv-bench/.installed: requirements/bench.txt .venv-bench/bin/python
	$(call install,$(BENCH_PYTHON))

benchmarks/fastify/node_modules: benchmarks/fastify/package-lock.json
	@if command -v npm >/dev/null; then echo "installing $<"; npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --silent && touch $@; \
	else echo "npm is missing: Fastify cannot be measured"; fi

# Go keeps its downloads and builds in .venv-bench. If there is a folder benchmarks/go/vendor, nothing is downloaded.
benchmarks/go/bin: export GOPATH = $(CURDIR)/.venv-bench/go
benchmarks/go/bin: export GOCACHE = $(CURDIR)/.venv-bench/go/cache
benchmarks/go/bin: export GOTOOLCHAIN = local
benchmarks/go/bin: .venv-bench/.installed benchmarks/go/go.mod benchmarks/go/go.sum $(wildcard benchmarks/go/*/*.go)
	@rm -rf $@
	@if test -d $(@D)/vendor || $(GO) mod download -modcacherw 2>/dev/null; then echo "building $(@D)"; $(GO) build -o bin/ ./... && touch $@; \
	else echo "pgx cannot be downloaded: Go cannot be measured"; fi
GO := .venv-bench/bin/go -C benchmarks/go

# A group's environment is up to date when its stamp is newer than its lock file.
.venv/.%: requirements/%.txt .venv/bin/python
	$(call install,$(PYTHON))

# If Python has disappeared, with its folder or in a system update, the stamps are out of date.
.venv/bin/python .venv-bench/bin/python: ;

# $(call install,PYTHON): creates the environment if it is missing, incomplete (venv writes bin/activate last), or has
# too old a Python; then installs what the lock file lists.
define install
@test -e $(@D)/bin/activate && $(@D)/bin/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
	$(1) -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "Python 3.11 or later is needed: PYTHON=/path/to/python3 names one"; exit 1; }; \
	echo "making $(@D)"; $(1) -m venv --clear $(@D); }
@echo "installing $<"
@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: $(HERE) -r $<
@$(@D)/bin/python -c '$(INSTALLED)' $< || { echo "pip has not installed into $(@D) what $< lists"; exit 1; }
@touch $@
endef
HERE = --no-user --prefix "$$PWD/$(@D)" --root / --target=
INSTALLED := import importlib.metadata, re, sys; \
	[importlib.metadata.version(name) for name in re.findall("^[-.A-Za-z0-9_]+(?===)", open(sys.argv[1]).read(), re.M)]

lock: export CUSTOM_COMPILE_COMMAND = make lock
lock: .venv/.check  ## lock the dependencies in pyproject.toml again, with hashes; with Python 3.11
	@# A newer Python's lock lacks what only the oldest needs, so that nothing could be installed there.
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	echo "the lock has to be made with Python 3.11: rm -r .venv && make lock PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/pip-compile $(LOCK) --output-file requirements/runtime.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra local --output-file requirements/local.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra local --extra test --output-file requirements/dev.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra check --constraint requirements/dev.txt --output-file requirements/check.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra aws --constraint requirements/dev.txt --output-file requirements/aws.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra local --extra bench --output-file requirements/bench.txt pyproject.toml
LOCK := --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --allow-unsafe

clean:  ## remove everything that the targets created, the local database included
	rm -rf .venv .venv-bench benchmarks/fastify/node_modules benchmarks/go/bin benchmarks/results/partial .data .mypy_cache .pytest_cache .ruff_cache .hypothesis
