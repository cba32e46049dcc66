# make serve [ARGS="--port 8000"]   sets up .venv where needed and serves the default model
# make test | test-all | smoke | page | check | lock | wheel | clean | distclean
# PYTHON=python3.11 uses that interpreter, in an environment of its own (.venv-3.11).

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-all smoke page clients ray aot fuzz check docs docs-check notebooks lock wheel clean distclean missing-python

ARGS ?=
TESTS ?=
ifeq ($(PYTHON),)
VENV := .venv
else
minor := $(patsubst python%,%,$(filter python3.%,$(notdir $(PYTHON))))
VENV := .venv-$(or $(minor),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),unknown)
endif

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# An interpreter that was removed or replaced leaves a link to nothing: the environment is then made again.
runnable := $(shell test -x $(PY) && echo yes)
# Tests run on the CPU unless told otherwise; an accelerator that is there must not change what they show.
pytest := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(PY) -m pytest -q

help:
	@echo 'make serve      serve the default model on port 30000; ARGS="--model ... --port ..."'
	@echo 'make setup      only make the environment ($(VENV))'
	@echo 'make test       the tests, with a tenth of the long random runs; make test-all: all of them; TESTS="tests/test_x.py"'
	@echo 'make smoke      a few fast tests'
	@echo 'make page       the tests of the page, in /usr/bin/chromium (CHROMIUM=...), which must be there'
	@echo 'make aot        the steps compiled for TPUs that are not there; needs libtpu'
	@echo 'make clients    other clients (agents, pydantic-ai, langchain, npm) against the default model'
	@echo 'make ray        two replicas on Ray Serve (deploy/ray), in an environment of their own'
	@echo 'make fuzz       ten minutes of random requests by schemathesis (SECONDS=60 for less)'
	@echo 'make check      format, lint, types, walls'
	@echo 'make docs       write the pages of flags and the tables of refused fields in docs/api.md'
	@echo 'make docs-check run every command of README and quickstart in a fresh clone (ARGS="--warm": with the cache there is)'
	@echo 'make notebooks  run notebooks/*.py and write the .ipynb with what they show'
	@echo 'make lock       resolve pyproject.toml into requirements/*.txt (LOCK="--upgrade" for newer versions)'
	@echo 'make wheel      build dist/*.whl'
	@echo 'make clean      remove what was built; make distclean: the environments too'
	@echo 'PYTHON=python3.11 uses that interpreter, in .venv-3.11'

$(STAMP): pyproject.toml requirements/py311.txt requirements/py312.txt tools/setup.sh $(if $(runnable),,missing-python)
	@sh tools/setup.sh $(VENV) $(PYTHON)
	@touch $@

# What notebooks need besides (150 MB): not for those who only serve.
NOTEBOOKS := $(VENV)/.notebooks
$(NOTEBOOKS): requirements/notebooks.txt | $(STAMP)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements/notebooks.txt
	@touch $@

missing-python:

setup: $(STAMP)

serve: $(STAMP)
	@exec $(PY) -m jaxserve $(ARGS)

# Two halves side by side: neither keeps two cores busy alone. What the second one says is printed at its end.
halves = @log=$$(mktemp); $(pytest) --part model >$$log 2>&1 & half=$$!; \
	$(pytest) --part rest; rest=$$?; \
	echo '==> what needs the default model'; wait $$half; model=$$?; cat $$log; rm -f $$log; \
	exit $$((rest ? rest : model))

test: $(STAMP) $(NOTEBOOKS)
	$(if $(TESTS),$(pytest) $(TESTS),$(halves))

test-all: export JAXSERVE_SLOW := 1
test-all: test

# The engine's own smoke tests count once there are some.
smoke: $(STAMP)
	$(pytest) tests/test_walls.py tests/test_flags.py tests/test_scheduler.py tests/test_pages.py tests/test_stop.py
	@if grep -qs 'def test.*smoke' tests/test_engine.py; then $(pytest) tests/test_engine.py -k smoke; fi

# 160 MB that nothing else needs, so it is no part of the locked requirements; without it make test skips these tests.
page: $(STAMP)
	@$(PY) -c 'import playwright' 2>/dev/null || $(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[page]'
	$(pytest) -rs tests/test_page.py tests/test_api_engine.py $(TESTS)

fuzz: $(STAMP)
	@sh tools/fuzz.sh $(VENV) $(or $(SECONDS),600)

# libtpu holds the TPU's compiler. No TPU is looked for, and several processes may load it.
aot: $(STAMP)
	@$(PY) -c 'import libtpu' 2>/dev/null || echo 'libtpu is not installed, so nothing is compiled: $(PY) -m pip install libtpu'
	JAXSERVE_AOT=1 JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 $(PY) -m pytest -q tests/aot $(TESTS)

# In an environment of its own: Ray wants other versions of what is locked here, and nothing else here needs it.
RAY := .venv-ray/.installed
$(RAY): deploy/ray/requirements.txt | $(STAMP)
	$(PY) -m venv --clear .venv-ray
	.venv-ray/bin/python -m pip install -q --disable-pip-version-check -r deploy/ray/requirements.txt
	@touch $@

ray: $(STAMP) $(RAY)
	JAXSERVE_RAY=1 $(pytest) -rs tests/test_ray.py tests/test_ray_prefix.py $(TESTS)

clients: $(STAMP)
	@sh tools/clients.sh $(VENV)

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m ty check --python $(PY)
	$(pytest) tests/test_walls.py

docs: $(STAMP)
	$(PY) -m tools.flags_doc > docs/flags.md.new
	mv docs/flags.md.new docs/flags.md
	$(PY) -m tools.coming_from_doc > docs/coming-from.md.new
	mv docs/coming-from.md.new docs/coming-from.md
	$(PY) -m tools.api_doc

# ARGS="paged_attention sharding": only these.
notebooks: $(STAMP) $(NOTEBOOKS)
	$(PY) -m tools.notebooks $(ARGS)

docs-check: $(STAMP)
	$(PY) -m tools.docs_check $(ARGS)

# No addresses, no header: the files must read the same wherever they were made. Versions stay unless LOCK says so.
compile := $(PY) -m uv pip compile -q --no-header --no-annotate --no-emit-index-url --extra test --extra dev $(LOCK)
lock: $(STAMP)
	$(compile) --python-version 3.11 pyproject.toml -o requirements/py311.txt
	$(compile) --python-version 3.12 -c requirements/constraints-py312.txt pyproject.toml -o requirements/py312.txt
	$(compile) --extra notebooks --python-version 3.11 -c requirements/py311.txt pyproject.toml -o requirements/notebooks.all
	grep -vxFf requirements/py311.txt requirements/notebooks.all > requirements/notebooks.txt
	rm requirements/notebooks.all

wheel: $(STAMP)
	$(PY) -m pip wheel -q --no-deps --no-build-isolation --no-index -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find jaxserve checkpoints kernels_pallas tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*
