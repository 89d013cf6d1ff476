# make install | demo | test | lint | bench | fuzz | mutate, each for one stack of
# host packages:
#
#   make test                      mmengine, mmcv, mmpretrain, mmdet, mmseg
#   make test STACK=onedl          the same imports from the onedl forks
#   make demo TASK=detection       classification (default), detection or
#                                  segmentation
#   make mutate                    break line after line, see what tests notice
#
# Every target builds what is missing of the environment first.
STACK ?= openmmlab
TASK ?= classification
CASES ?= 20000
SEED ?= 0

# mmengine's, on every import.
export PYTHONWARNINGS := ignore:pkg_resources is deprecated

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# The installer's last line is the environment's folder.
IN_ENV = venv=$$(requirements/install.sh $(STACK) | tail -n 1) && "$$venv/bin/python"

.PHONY: install demo test lint bench fuzz mutate

install:
	@$(IN_ENV) --version

demo:
	@$(IN_ENV) tools/demo.py --task $(TASK)

test:
	@$(IN_ENV) -m pytest -q -n 2 --dist loadfile tests

lint:
	@$(IN_ENV) -m ruff check .
	@$(IN_ENV) -m ruff format --check .

# Damaged files by the thousand: make fuzz CASES=100000 SEED=1
fuzz:
	@OMP_NUM_THREADS=1 $(IN_ENV) tests/fuzz.py --cases $(CASES) --seed $(SEED)

# Each line of a table is broken in a copy, and some test must fail.
mutate:
	@$(IN_ENV) tests/mutations.py --jobs 2

bench:
	@$(IN_ENV) tools/benchmark.py --network resnet18 resnet50 mobilenet \
	  --threads 2 --out benchmark.json --plot benchmark.png --force
