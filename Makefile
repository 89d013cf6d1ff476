# make install | demo | test | lint | bench | fuzz | mutate, each for one stack of
# OpenMMLab packages; test-yolo | sweep | sweep-hosts with more packages:
#
#   make test                      mmengine, mmcv, mmpretrain, mmdet, mmseg
#   make test STACK=onedl          the same imports from the onedl forks
#   make demo TASK=detection       classification (default), detection,
#                                  segmentation; torch: without OpenMMLab
#   make docs                      the docs site, build/docs/index.html
#   make types                     mypy on the lower storey
#   make dist                      wheel and source archive, checked
#   make mutate                    break one line at a time, see if tests fail
#   make test-yolo                 ultralytics: docs/yolo.md
#   make test-compiled             every block under torch.compile
#   make notebooks                 run docs/notebooks, keep their outputs
#   make sweep                     blocks in every config of the stack
#   make sweep-hosts               and of mmpose, mmaction2, mmdet3d, mmyolo,
#                                  mmocr, mmrotate; writes docs/hosts.md
#
# Every target first builds the environment, or what is missing of it.
STACK ?= openmmlab
TASK ?= classification
CASES ?= 20000
SEED ?= 0
ROWS ?= sweep.jsonl

# mmengine causes this warning on every import.
export PYTHONWARNINGS := ignore:pkg_resources is deprecated

SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# The last line that the installer prints is the environment's folder.
IN_ENV = venv=$$(requirements/install.sh $(STACK) | tail -n 1) && "$$venv/bin/python"

# The same, with more packages on top: $(call IN_ENV_WITH,yolo).
IN_ENV_WITH = venv=$$(requirements/install.sh $(STACK) $(1) | tail -n 1) \
  && "$$venv/bin/python"

# Classification and plain torch do without what has to be compiled. Where
# the whole stack is built already, the installer takes that.
DEMO_STACK = $(STACK)
ifeq ($(STACK),openmmlab)
DEMO_STACK = $(or $(SMALLER_$(TASK)),openmmlab)
endif
SMALLER_classification = light
SMALLER_torch = torch

TASKS = classification detection segmentation torch
DEMO = tools/demo.py --task $(TASK)
ifeq ($(TASK),torch)
DEMO = tools/demo_torch.py
endif

.PHONY: install demo test test-yolo test-boxes test-compiled lint types docs \
  dist bench fuzz mutate sweep sweep-hosts notebooks

install:
	@$(IN_ENV) --version

demo:
	$(if $(filter $(TASK),$(TASKS)),,$(error unknown TASK '$(TASK)'; allowed: $(TASKS)))
	@venv=$$(requirements/install.sh $(DEMO_STACK) | tail -n 1) \
	  && "$$venv/bin/python" $(DEMO)

test:
	@$(IN_ENV) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

test-yolo:
	@$(call IN_ENV_WITH,yolo) -m pytest -q -m yolo tests

# Write every kind of detector into a file with boxes: half a minute.
test-boxes:
	@MMDBB_ALL_DETECTORS=1 $(IN_ENV) -m pytest -q tests/test_mm/test_boxes.py

# Compile every block with inductor: minutes.
test-compiled:
	@MMDBB_ALL_COMPILED=1 $(IN_ENV) -m pytest -q \
	  tests/test_blocks/test_compiled.py

lint:
	@$(IN_ENV) -m ruff check .
	@$(IN_ENV) -m ruff format --check .

types:
	@$(call IN_ENV_WITH,types) -m mypy

# Without warnings, or it fails. Needs no more than the light stack.
docs:
	@$(call IN_ENV_WITH,docs) tools/build_docs.py build/docs

dist:
	@$(call IN_ENV_WITH,release) tools/build_release.py dist

# Read thousands of damaged files: make fuzz CASES=100000 SEED=1
fuzz:
	@OMP_NUM_THREADS=1 $(IN_ENV) tests/fuzz.py --cases $(CASES) --seed $(SEED)

# Break each line that tests/mutations.py lists in a copy of the code; some
# test must fail.
mutate:
	@$(IN_ENV) tests/mutations.py --jobs 2

bench:
	@$(IN_ENV) tools/benchmark.py --network resnet18 resnet50 mobilenet \
	  --threads 2 --out benchmark.json --plot benchmark.png --force

# Both go on where they were cut: ROWS has a line for each architecture.
sweep:
	@OMP_NUM_THREADS=1 $(IN_ENV) -W ignore tools/sweep.py $(ROWS)

sweep-hosts:
	@OMP_NUM_THREADS=1 $(call IN_ENV_WITH,hosts) -W ignore tools/sweep.py \
	  $(ROWS) --docs

# Writes the outputs into the notebooks; minutes.
notebooks:
	@$(call IN_ENV_WITH,notebooks) tools/workshop/notebooks.py
