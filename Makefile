.PHONY: setup quickstart test test-all lint docs

setup:            ## .venv with everything a run needs
	bash tools/setup.sh run

quickstart: setup ## data, tokenizer, training, evaluation, pictures, text: runs/quickstart
	bash examples/quickstart.sh

test:             ## set up the oracles and run all tests but the slow ones
	bash tools/setup.sh test
	bash tools/test.sh

test-all:         ## the slow ones too
	bash tools/setup.sh test
	bash tools/test.sh --all

lint:             ## ruff, mypy and the floors' import test
	bash tools/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q tests/test_floors.py

docs:             ## the pages as a site, in build/site
	bash tools/setup.sh test
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
