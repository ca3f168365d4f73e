# `make` alone lists what there is. The pinned packages go into .venv on first use.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# Processes of `make test`; tests that share a costly fixture stay in one.
WORKERS ?= 2


.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

# -- use it --------------------------------------------------------------------------------------------------

.PHONY: demo
demo: .venv-demo ## the whole road on this machine; PHOTOS=DIR plays a folder as the web, WEIGHTS=FILE names MobileNetV2 weights
	@exec $(PY) infra/demo.py $(if $(PHOTOS),--photos "$(PHOTOS)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")

.PHONY: stop
stop: ## end a demo that runs in another terminal or was left behind
	@if [ -x $(PY) ]; then $(PY) infra/demo.py --stop; fi

.PHONY: clean
clean: stop ## delete what the demo and the tests made (var, var-samples, caches); .venv stays
	rm -rf var var-samples .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage htmlcov

# -- work on it ----------------------------------------------------------------------------------------------

.PHONY: test
test: .venv-dev ## every test, against real MariaDB, MinIO, MLflow, Airflow and Chromium (installs what is missing)
	@infra/test-servers
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder --cov --cov-report=term:skip-covered $(ARGS)

.PHONY: test-unit
test-unit: .venv-dev ## the fast tests: no server, no browser
	@$(PYTEST) -m unit $(ARGS)

.PHONY: test-integration
test-integration: .venv-dev ## the tests that start real servers
	@infra/test-servers
	$(PYTEST) -m integration $(ARGS)

.PHONY: test-browser
test-browser: .venv-dev ## the tests in a real Chromium
	@infra/test-servers
	$(PYTEST) -m e2e $(ARGS)

.PHONY: test-images
test-images: .venv-dev ## what `make images` built: users, tools, sizes, SBOMs, TLS to a database
	@$(PYTEST) -m images tests/e2e/test_container_images.py tests/integration/test_database_tls.py $(ARGS)

.PHONY: test-compose
test-compose: .venv-dev ## the platform by docker compose, its pipelines and its page (half an hour; needs `make images`)
	@infra/test-servers
	$(PYTEST) -m compose -x -s tests/e2e/test_compose.py $(ARGS)

.PHONY: test-cluster-smoke
test-cluster-smoke: .venv-dev ## what the cluster of KUBECONFIG says of k8s/, without images (two minutes)
	@$(PYTEST) -m cluster_smoke -x tests/e2e/test_cluster_smoke.py $(ARGS)

.PHONY: test-cluster
test-cluster: .venv-dev ## the platform on the cluster of KUBECONFIG, from an empty namespace to uninstall (an hour; needs `make images` loaded)
	$(PYTEST) -m cluster -x -s tests/e2e/test_cluster.py $(ARGS)

.PHONY: load
load: .venv-dev ## a minute of realistic load on a running API; URL=… USERS=… SECONDS=…; writes var/load.html
	@mkdir -p var
	.venv/bin/locust -f tests/load/locustfile.py --headless --only-summary --html var/load.html \
	  --host "$(or $(URL),http://127.0.0.1:8000)" --users $(or $(USERS),16) --spawn-rate 16 --run-time $(or $(SECONDS),60)s

.PHONY: fuzz
fuzz: .venv-dev ## coverage-guided fuzzing of the picture decoder and the request parsers; SECONDS=…
	@export PYTHONPATH=tests
	$(PY) tests/fuzz/fuzz.py pictures $(or $(SECONDS),60)
	$(PY) tests/fuzz/fuzz.py tensors $(or $(SECONDS),60)
	$(PY) tests/fuzz/fuzz.py forms $(or $(SECONDS),60)

.PHONY: lint
lint: .venv-dev ## ruff (rules and format) and the import rules
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports

.PHONY: format
format: .venv-dev ## let ruff format the code and mend what it can
	@$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

.PHONY: types
types: .venv-dev ## mypy, strict: the package, the web app, infra and the DAGs
	@$(PY) -m mypy

.PHONY: bench
bench: .venv-dev ## every benchmark in benchmarks/, one after the other
	@for script in benchmarks/*.py; do echo "== $$script"; $(PY) "$$script"; done

.PHONY: docs
docs: .venv-dev ## write docs/settings.md and docs/cli.md from the code
	@$(PY) infra/reference_docs.py

# One resolution for all: every set takes its versions from the whole.
COMPILE = uv pip compile --quiet --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 \
	--custom-compile-command "make requirements"
.PHONY: requirements
requirements: ## pin all packages anew (needs uv)
	@whole=$$(mktemp); trap 'rm -f "$$whole"' EXIT
	$(COMPILE) --upgrade --all-extras --group dev pyproject.toml -o "$$whole"
	$(COMPILE) -c "$$whole" --extra pipeline --extra serving --extra webapp --group dev pyproject.toml -o requirements/dev.txt
	$(COMPILE) -c "$$whole" --extra pipeline --extra serving --extra webapp pyproject.toml -o requirements/demo.txt
	for set in pipeline serving webapp cluster tracking; do
	  $(COMPILE) -c "$$whole" --extra $$set pyproject.toml -o requirements/$$set.txt
	done
	printf 'hatchling>=1.27\nuv>=0.8\n' | $(COMPILE) --upgrade - -o requirements/build.txt
	printf 'pip-audit>=2.10\n' | $(COMPILE) --upgrade - -o requirements/audit.txt
	# What OpenCV's own pyproject.toml asks for to be built with Python 3.11.
	printf 'numpy==2.0.2\npackaging\npip\nscikit-build>=0.14\nsetuptools==59.2.0\nwheel\n' | $(COMPILE) --upgrade - -o requirements/opencv.txt

# Not what OpenCV's release names for its own build, of which nothing is in an image. `--strict`, for a package of which
# nobody can tell anything would pass.
AUDITED = $(sort $(filter-out requirements/opencv.txt,$(wildcard requirements/*.txt)))
.PHONY: audit
audit: ## ask PyPI for known vulnerabilities of the pinned packages; fails where it cannot be asked
	@python3 -m venv var/audit
	var/audit/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/audit.txt
	failed=
	for pins in $(AUDITED); do
	  echo "== $$pins"
	  var/audit/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner=off -r "$$pins" || failed="$$failed $$pins"
	done
	[ -z "$$failed" ] || { echo "not clean, or not to be asked:$$failed" >&2; exit 1; }

# -- ship it -------------------------------------------------------------------------------------------------

VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
.PHONY: images
images: ## build the five container images, each with its SBOM in dist/; IMAGES="api webapp" builds some, PIP_INDEX_URL names an index
	@docker/build $(VERSION) $(IMAGES)

.PHONY: images-again
images-again: ## build the images a second time, from nothing, and compare them with the first, file by file
	@NO_CACHE=1 REGISTRY=lawnwatch-again DIST=var/dist-again docker/build $(VERSION) $(IMAGES)
	for name in $(or $(IMAGES),api webapp pipeline mlflow minio); do
	  python3 docker/compare.py "lawnwatch/$$name:$(VERSION)" "lawnwatch-again/$$name:$(VERSION)"
	done

.PHONY: manifests
manifests: ## k8s/ and the chart's README, from the chart (needs helm)
	@python3 infra/render_chart.py

.PHONY: secrets
secrets: ## passwords for `docker compose up`, written into .env once
	@python3 infra/make_secrets.py

.PHONY: .venv-demo .venv-dev
.venv-demo:
	@infra/install demo
.venv-dev:
	@infra/install dev
