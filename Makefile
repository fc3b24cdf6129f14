# What a person types. Each target installs what it needs into .venv, from the hash-locked requirements.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help run test check aws lock clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

run: .venv/.local  ## the whole system on this machine: PostgreSQL, message service, gateway
	@$(BIN)/python local_stack.py

test: .venv/.dev  ## every test, against a real PostgreSQL and real sockets
	$(BIN)/python -m pytest

check: .venv/.dev  ## lint, types, Kubernetes schemas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# An unknown schema is only a warning to it: whatever it says counts as a failure.
	said=$$($(BIN)/kubernetes-validate --strict --quiet $(KUBERNETES:%=-k %) k8s.yaml 2>&1) && test -z "$$said" || { echo "$$said"; exit 1; }
KUBERNETES := 1.37 1.36 1.35 1.34

aws: .venv/.dev .venv/.aws  ## lint, validate and simulate aws.yaml, without AWS
	$(BIN)/python -m pytest tests/aws

# A group's environment is up to date when its stamp is newer than its lock file.
.venv/.%: requirements-%.txt
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $<"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@touch $@

lock: export CUSTOM_COMPILE_COMMAND = make lock
lock: .venv/.dev  ## pin again, with hashes, what pyproject.toml names
	$(BIN)/pip-compile $(LOCK) --output-file requirements.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra local --output-file requirements-local.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra local --extra test --extra check --extra lock --output-file requirements-dev.txt pyproject.toml
	$(BIN)/pip-compile $(LOCK) --extra aws --constraint requirements-dev.txt --output-file requirements-aws.txt pyproject.toml
LOCK := --quiet --strip-extras --generate-hashes --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --allow-unsafe

clean:  ## remove what the targets made, the local database included
	rm -rf .venv .data .mypy_cache .pytest_cache .ruff_cache .hypothesis
