# One-word commands, the same here and in CI. Each sets up the programs that it needs: see deploy/local/ensure.
VENV ?= .venv
READY := $(VENV)/.ready
# One worker more than processors: the tests wait for RabbitMQ and browsers half of the time.
WORKERS ?= $(shell expr $$(nproc) + 1 \& $$(nproc) \< 4 \| 4)

.PHONY: help demo test unit coverage chaos leaks soak browser-chaos proxies rollout mutants mutation attacks bench image test-slow check \
	format exports lock clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: $(READY) ## RabbitMQ, bridge, a sample worker and a live page; Ctrl-C ends all of them
	@[ -n "$$BRIDGE_AMQP_URL" ] || deploy/local/ensure rabbitmq
	@exec $(VENV)/bin/python -m deploy.local.demo

test: $(READY) check $(if $(TESTS),,coverage) ## every test, on private RabbitMQs (this machine's and 4.3) and in three browsers; FEED=log: with that feed
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure rabbitmq4 > /dev/null
	@deploy/local/ensure chromium
	@deploy/local/ensure firefox
	@deploy/local/ensure webkit
	@deploy/local/ensure kubectl
	@deploy/local/ensure promtool
	@deploy/local/ensure proxies
	@deploy/local/ensure php
	@$(MAKE) --no-print-directory $(NODE)/.ready
	@SUITE_RABBITMQ_ROOT=$$(deploy/local/ensure rabbitmq4 2>/dev/null) SUITE_FEED=$(or $(FEED),queues) \
		$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

coverage: $(READY) ## branch coverage of the unit tests, against the floors of tests/coverage_floor.py
	@mkdir -p .run
	@$(VENV)/bin/python -m pytest -q --numprocesses $(WORKERS) \
		--cov=bridge --cov-branch --cov-report=json:.run/coverage.json tests/unit
	@$(VENV)/bin/python -m tests.coverage_floor .run/coverage.json

unit: $(READY) ## the unit tests alone; needs only the virtual environment
	@$(VENV)/bin/python -m pytest -q --numprocesses $(WORKERS) tests/unit

# npm packages of the tests: validators, and clients of other projects. See tests/node/__init__.py.
NODE := .run/node
$(NODE)/.ready: tests/node/package.json tests/node/package-lock.json
	@deploy/local/ensure node
	@set -e; mkdir -p $(NODE); echo "==> $(NODE): Node $$(node --version), with the tests' locked packages" >&2; \
	cp tests/node/package.json tests/node/package-lock.json $(NODE)/; \
	npm ci --prefix $(NODE) --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

chaos: $(READY) ## faults of all kinds under load: LENGTH seconds, ROUNDS seeds from SEED, NODES, FEED=log or queues,log; RABBITMQ=4.3 for one version
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure rabbitmq4 > /dev/null
	@SUITE_RABBITMQ_ROOT=$$(deploy/local/ensure rabbitmq4 2>/dev/null) SUITE_FEED=$(or $(FEED),queues) \
		$(VENV)/bin/python -m tests.chaos.run --seconds $(or $(LENGTH),120) --rounds $(or $(ROUNDS),4) \
		$(if $(SEED),--seed $(SEED)) $(if $(NODES),--nodes $(NODES)) $(if $(RABBITMQ),--rabbitmq $(RABBITMQ))

leaks: $(READY) ## leaks after STREAMS streams, LOSSES lost connections and TOKENS expired tokens; RABBITMQ=4.3 for one version
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure rabbitmq4 > /dev/null
	@SUITE_RABBITMQ_ROOT=$$(deploy/local/ensure rabbitmq4 2>/dev/null) \
		$(VENV)/bin/python -m tests.endurance.leaks $(if $(STREAMS),--streams $(STREAMS)) $(if $(LOSSES),--losses $(LOSSES)) \
		$(if $(TOKENS),--tokens $(TOKENS)) $(if $(RABBITMQ),--rabbitmq $(RABBITMQ))

soak: $(READY) ## steady load for LENGTH seconds, an hour by default, and a table of latency, CPU, queues, tasks and memory
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure rabbitmq4 > /dev/null
	@SUITE_RABBITMQ_ROOT=$$(deploy/local/ensure rabbitmq4 2>/dev/null) \
		$(VENV)/bin/python -m tests.endurance.soak --seconds $(or $(LENGTH),3600) $(if $(RABBITMQ),--rabbitmq $(RABBITMQ))

browser-chaos: $(READY) ## two people and seven tabs in each of three browsers: LENGTH seconds, ROUNDS seeds from SEED; ENGINE for one
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure chromium
	@deploy/local/ensure firefox
	@deploy/local/ensure webkit
	@$(VENV)/bin/python -m tests.browser.chaos --seconds $(or $(LENGTH),120) --rounds $(or $(ROUNDS),3) $(if $(SEED),--seed $(SEED)) \
		$(if $(ENGINE),--engine $(ENGINE))

proxies: $(READY) ## five real proxies in front of the bridge, at length, with figures; ONLY=nginx for one
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure chromium
	@deploy/local/ensure proxies
	@$(VENV)/bin/python -m pytest -v -s tests/deploy/test_proxies.py tests/deploy/long_proxies.py $(if $(ONLY),-k $(ONLY))

mutants: $(READY) ## apply each mutant of the code and check that a test fails
	@deploy/local/ensure rabbitmq
	@$(VENV)/bin/python -m tests.mutants

MUTATION := .run/mutation
mutation: $(READY) $(MUTATION)/.ready ## a tool's mutants of the pure files; ONLY="sse budgets" for some of them; takes long
	@$(VENV)/bin/python -m tests.mutants.mutation $(ONLY)

$(MUTATION)/.ready: tests/mutants/mutation.lock
	@set -e; python=$$(deploy/local/ensure python); mkdir -p .run; rm -rf $(MUTATION); "$$python" -m venv $(MUTATION); \
	$(MUTATION)/bin/pip install -qq --disable-pip-version-check --require-hashes -r tests/mutants/mutation.lock
	@touch $@

test-slow: $(READY) ## the integration tests once more, with the AMQP library's own deliveries
	@deploy/local/ensure rabbitmq
	@$(MAKE) --no-print-directory $(NODE)/.ready
	@SUITE_BRIDGE=tests.slow SUITE_RABBITMQ_ROOT= $(VENV)/bin/python -m pytest tests/integration tests/chaos

rollout: $(READY) ## a rolling update of CLIENTS streams with the manifests' own timings, behind a real proxy; four minutes
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure kubectl
	@deploy/local/ensure proxies
	@$(VENV)/bin/python -m tests.deploy.rollout --clients $(or $(CLIENTS),600)

attacks: $(READY) ## the delay of an innocent stream's events during attacks, LENGTH seconds each; ONLY=flood for one
	@deploy/local/ensure rabbitmq
	@$(VENV)/bin/python -m tests.bench.attacks --seconds $(or $(LENGTH),8) $(if $(ONLY),--only $(ONLY))

bench: $(READY) ## the bridge and its peers side by side, ROUNDS times; half an hour, results in docs/benchmark.md
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure bench
	@$(MAKE) --no-print-directory $(BENCH)/.ready
	@$(VENV)/bin/python -m tests.bench --rounds $(or $(ROUNDS),3) --write docs

BENCH := .run/bench
PEERS := tests/bench/peers
$(BENCH)/.ready: requirements.lock $(PEERS)/requirements.lock $(PEERS)/package-lock.json
	@set -e; python=$$(deploy/local/ensure fast-python); mkdir -p $(BENCH); \
	echo "==> $(BENCH): $$($$python --version) and Node, with the peers' locked dependencies" >&2; \
	rm -rf $(BENCH)/venv; "$$python" -m venv $(BENCH)/venv; \
	for lock in requirements.lock $(PEERS)/requirements.lock; do \
		$(BENCH)/venv/bin/pip install -qq --disable-pip-version-check --require-hashes -r $$lock; done; \
	cp $(PEERS)/package.json $(PEERS)/package-lock.json $(BENCH)/; \
	npm ci --prefix $(BENCH) --no-audit --no-fund --loglevel=error >/dev/null
	@touch $@

check: $(READY) $(NODE)/.ready ## formatting, lint, and the types of Python and of the client and the console
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy --no-error-summary
	@$(NODE)/node_modules/.bin/tsc --project tsconfig.json

format: $(READY) ## format the code
	@$(VENV)/bin/ruff format --quiet .
	@$(VENV)/bin/ruff check --quiet --fix .

image: $(READY) ## build the container image, with Docker or without any engine, then run and test it
	@deploy/container/build
	@deploy/local/ensure rabbitmq
	@deploy/local/ensure containers
	@$(VENV)/bin/python -m pytest -q tests/deploy/image_checks.py

ALERTS := deploy/kubernetes/components/alerts
FOLDER := bridge/samples
SAMPLES := BRIDGE_SCHEMAS=bridge.samples $(VENV)/bin/bridge
exports: $(READY) ## write the files made from the sample event types, the copy of schemas/, and the dashboard
	@$(SAMPLES) schemas export > $(FOLDER)/events.schema.json
	@$(SAMPLES) schemas export --format typescript > $(FOLDER)/events.ts
	@$(SAMPLES) schemas export --format asyncapi > $(FOLDER)/asyncapi.json
	@cp schemas/*.py deploy/kubernetes/base/catalogue/
	@$(VENV)/bin/python $(ALERTS)/dashboard.py > $(ALERTS)/dashboard.json

# Versions and hashes, without a registry's address.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header --no-annotate --upgrade
lock: $(READY) ## renew the lock files (needs uv, and npm)
	@$(LOCK) pyproject.toml --extra server --extra tracing -o requirements.lock
	@$(LOCK) pyproject.toml --extra server --extra tracing --group dev -o requirements-dev.lock
	@$(LOCK) --group build -o requirements-build.lock
	@$(LOCK) tests/mutants/mutation.in -o tests/mutants/mutation.lock
	@cd $(PEERS) && $(LOCK) requirements.in --constraint ../../../requirements.lock -o requirements.lock
	@# The member "funding" has addresses too.
	@for folder in $(PEERS) tests/node; do (cd $$folder && \
		npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund --loglevel=error >/dev/null && \
		$(abspath $(VENV))/bin/python -c "import json, pathlib; lock = pathlib.Path('package-lock.json'); \
		held = json.loads(lock.read_text()); [entry.pop('funding', None) for entry in held['packages'].values()]; \
		lock.write_text(json.dumps(held, indent=2) + '\n')") || exit 1; done

$(READY): requirements-dev.lock pyproject.toml
	@set -e; python=$$(deploy/local/ensure python); \
	echo "==> $(VENV): $$($$python --version), locked dependencies" >&2; \
	rm -rf $(VENV); "$$python" -m venv $(VENV); \
	export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	$(VENV)/bin/pip install -qq --require-hashes -r requirements-dev.lock; \
	$(VENV)/bin/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## remove the files that the other commands made
	rm -rf $(VENV) .run .mypy_cache .ruff_cache .pytest_cache .hypothesis
