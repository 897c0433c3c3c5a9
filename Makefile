# `check` checks, `style` mends, `types` runs mypy on the packages under their import names.
.PHONY: check style types test
check: types
	ruff check .
	ruff format --check .

style:
	ruff check --fix .
	ruff format .

types:
	rm -rf build/types
	python -m pip install --quiet --no-deps --target build/types .
	MYPYPATH=build/types mypy .

test:
	python -m pytest
