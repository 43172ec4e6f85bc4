# The project's commands; `make` alone lists them. The environment is made at the first one and again when
# pyproject.toml or constraints.txt changes. Nothing here needs it to be activated.
#
#   make run RECIPE=recipes/hh.yaml DATA=/path/to/hh TARGET=dpo
#   make test PYTEST_ARGS='-k flow'
#   make run PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Processes that share the tests out, file by file; each takes about 1 GiB. More than the two cores of a small machine:
# many tests wait for servers.
TEST_WORKERS ?= 4
READY  := $(VENV)/.installed
# Every file that pip fetches is held against the lock; the project's own folder, of which there is no hash, may stand
# beside them. pip itself comes first: an older one cannot do that.
LOCK   := constraints.hashed.txt
HELD   := --no-require-hashes --constraint $(LOCK) --build-constraint $(LOCK)
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP    := $(BIN)/python -m pip --disable-pip-version-check

FLOW_ARGS := $(if $(TARGET),--target $(TARGET)) $(if $(FORCE),--force $(FORCE)) \
             $(if $(RECIPE),--recipe $(RECIPE)) $(if $(DATA),--data $(DATA))
AGAIN     := make run$(if $(TARGET), TARGET=$(TARGET))$(if $(FORCE), FORCE=$(FORCE))$(if $(RECIPE), RECIPE=$(RECIPE))$(if $(DATA), DATA="$(DATA)")

.DEFAULT_GOAL := help
.PHONY: help run repro test suite mlflow prefect up down environment audit

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(READY) ## run the whole pipeline as a Prefect flow; ends with a table (TARGET=, FORCE=, RECIPE=, DATA=)
	@RANKWISE_AGAIN='$(AGAIN)' $(BIN)/python -m flows.align $(FLOW_ARGS)

repro: $(READY) ## the same stages by DVC alone, without Prefect
	@PATH="$(abspath $(BIN)):$$PATH" python -m flows.guarded_dvc repro $(TARGET)

test: $(READY) ## the tests that take seconds; PYTEST_ARGS='-m "slow or not slow"' for all
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

suite: ## all tests, the slow ones included; leaves .rankwise/suite.md
	@$(MAKE) --no-print-directory test PYTEST_ARGS='-m "slow or not slow" --suite-report=.rankwise/suite.md $(PYTEST_ARGS)'

mlflow: $(READY) ## show training runs and models in MLflow's page
	@$(BIN)/python -m tasks.tracking ui

prefect: $(READY) ## show flow runs in Prefect's page, on http://127.0.0.1:4200
	@$(BIN)/python -m flows.server

up: $(READY) ## a team's services on this machine: PostgreSQL, S3, Prefect, MLflow, a worker (docs/stack.md)
	@$(BIN)/python -m infra.stack up

down: $(READY) ## stop them, keep their data
	@$(BIN)/python -m infra.stack down

environment: $(READY) ## make the environment and no more

audit: ## known vulnerabilities of the versions in the lock, asked of the package index (docs/security.md)
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit; }
	@$(VENV)/audit/bin/pip-audit --strict --disable-pip --requirement $(LOCK) $(AUDIT_ARGS)

# The stamp is written last, so an installation that broke off is done again. Which build of PyTorch, CPU or CUDA, is
# for the machine's own configuration of pip to say: it is chosen before there are hashes to choose by.
$(READY): pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the environment into $(VENV) (minutes, once)"
	@sed -n '/^pip==/,/[^\\]$$/p' $(LOCK) > $(VENV)/pip.txt
	@$(PIP) install --quiet --require-hashes -r $(VENV)/pip.txt
	@test -n "$(wildcard $(VENV)/lib/*/site-packages/torch-$(TORCH)[+.]*)" || { \
	  $(PIP) download --quiet --no-deps --dest $(VENV)/torch torch==$(TORCH) && \
	  $(PIP) install --quiet --no-deps --no-index --find-links $(VENV)/torch $(HELD) torch && rm -r $(VENV)/torch; }
	@$(PIP) install --quiet $(HELD) -e '.[dev]'
	@touch $@
