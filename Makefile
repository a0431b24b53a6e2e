# make demo | test | test-all | test-matrix | lint
#
# Plain `make` builds .venv with pinned dependencies, once, and uses it.
# `make PY=python3 ...` uses that Python as it is: no registry is asked; a missing lint tool is skipped with a line.

VENV := .venv
PYTEST_ARGS ?=

SITE := build/site
TREE := build/tree

ifdef PY
  PYTHON := $(PY)
  READY := offline
  export PYTHONPATH := $(CURDIR)/$(SITE)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PYTHON := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif

has = $(PYTHON) -c "import importlib.util as u, sys; sys.exit(u.find_spec('$(1)') is None)"

.PHONY: demo test test-all test-matrix lint offline clean

demo: $(READY)
	$(PYTHON) -m fxfuse demo

test: lint
	$(call pytest,-m "not slow")

test-all: export HYPOTHESIS_PROFILE := deep
test-all: lint
	$(call pytest,)

# The trainers, adapters and quantized models beside other versions of the libraries that they come from: each file of tests/matrix
# overrides constraints.txt, in an environment of its own. `make matrix-newest` runs one of them.
MATRIX := $(basename $(notdir $(wildcard tests/matrix/*.txt)))
MATRIX_TESTS := $(wildcard $(patsubst %,tests/model/test_%.py,trainers_* adapter* lora_models qlora prepared_for_kbit quantize merge))

test-matrix: $(MATRIX:%=matrix-%)

matrix-%: build/matrix/%/.installed
	$(MAKE) --no-print-directory --file $(firstword $(MAKEFILE_LIST)) matrix-tests PYTHON=build/matrix/$*/bin/python

matrix-tests:
	$(call pytest,-m "not slow" $(MATRIX_TESTS))

.PRECIOUS: build/matrix/%/.installed
build/matrix/%/.installed: tests/matrix/%.txt pyproject.toml constraints.txt
	mkdir -p $(@D)
	awk -F== 'FNR == NR {of[tolower($$1)] = 1} FNR == NR || !(tolower($$1) in of)' $< constraints.txt > $(@D)/constraints.txt
	test -x $(@D)/bin/python || python3 -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt setuptools
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

lint: $(READY) $(TREE)
	@if $(call has,ruff); then $(PYTHON) -m ruff check .; else $(call skipped,ruff); fi
	@if $(call has,mypy); then MYPYPATH=$(TREE) $(PYTHON) -m mypy -p fxfuse; else $(call skipped,mypy); fi

# One process for each of two cores, one thread in each; a single process where pytest-xdist is missing.
define pytest
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(1) \
	  $$($(call has,xdist) && echo "-n 2 --dist worksteal") $(PYTEST_ARGS)
endef

define skipped
$(if $(PY),echo "$(1) is not installed in $(PY): skipped",{ echo "$(1) is missing from $(VENV)"; exit 1; })
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt setuptools
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

# The package alone, into a Python that has torch: into its site-packages, or if that is read-only, beside the sources.
# Where neither can be, the checkout itself is importable; only the backend's name is then not found.
offline:
	@$(call has,torch) || { echo "$(PY) cannot import torch; run plain 'make' to build $(VENV) instead"; exit 1; }
	@$(call installed) || $(call install,--editable .) || $(call install,--upgrade --target $(SITE) .) \
	  || echo "fxfuse cannot be installed into $(PY): it runs from this folder, without its entry point"

install = $(PY) -m pip install --quiet --no-deps --no-build-isolation $(1) >/dev/null 2>&1

# Is the package that this Python has, this checkout?
installed = (cd / && $(PYTHON) -c "import importlib.metadata as m, fxfuse, sys; m.version('fxfuse'); \
  sys.exit(not fxfuse.__file__.startswith('$(CURDIR)/fxfuse/'))" 2>/dev/null)

# The package as it will be installed, for mypy, which does not read setuptools' package-dir.
$(TREE): FORCE
	@rm -rf $@ && mkdir -p $@/fxfuse
	@ln -s $(CURDIR)/fxfuse/* $(CURDIR)/kernels $(CURDIR)/patterns $@/fxfuse/
FORCE:

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
