# The gate's steps, in its order. Each runs alone, in an environment with `pip install -e '.[test]'`.
DIST ?= dist

.PHONY: all lint types layers test faults wheel docs measures
all: lint types layers test faults wheel

lint:  # style and format
	ruff check .
	ruff format --check .

types:
	mypy

layers:  # each package imports only from those below it
	lint-imports

test:  # everything that takes seconds, with a private Ray
	pytest -n 2

faults:  # killed processes, lost nodes, whole searches on clusters
	pytest -n 2 -m faults

wheel:
	python -m build --wheel --outdir $(DIST)

docs:  # README, docs/, cluster/ and jobs/ alone
	pytest tests/docs

measures:  # lengths of functions, numbers of parameters, names defined twice
	python tests/support/measures.py
